"""Damage of a sample's JSON and of what it says."""

from __future__ import annotations

import gzip
import json
from typing import Any

from tests.damage.kinds import RECORD, Kind, among, encoded, look, member

TURNS = [{"from": "human", "value": "what is it"}, {"from": "gpt", "value": "a circle"}]


def _odd(content: Any, image: bool) -> Any:
    """`content`: bytes, a record, or what makes either."""

    def make() -> bytes:
        made = content() if callable(content) else content
        picture = member("odd.png", encoded(look(), "PNG")) if image else b""
        return member("odd.json", made) + picture

    return among(make)


def bad(content: Any, *reasons: str, image: bool = True, seen: Any = "index") -> Kind:
    return Kind(_odd(content, image), "bad", {"odd": reasons}, seen=seen)


def sound(content: Any, image: bool = True) -> Kind:
    return Kind(_odd(content, image), "sound", key="odd", shown=look if image else None)


def long(content: Any, *reasons: str) -> Kind:
    return Kind(_odd(content, False), "long", {"odd": reasons}, key="odd")


def talk(*turns: Any) -> dict[str, Any]:
    return {"conversations": list(turns)}


def without(name: str) -> dict[str, str]:
    return {key: value for key, value in RECORD.items() if key != name}


_WHOLE = json.dumps(RECORD).encode()
_HUMAN, _GPT = TURNS

JSON = {
    "empty": bad(b"", "bad_json"),
    "cut": bad(_WHOLE[:40], "bad_json"),
    "zeros": bad(bytes(300), "bad_json"),
    "invalid-utf-8": bad(_WHOLE.replace(b"red", b"r\xffd"), "bad_json"),
    "latin-1": bad(_WHOLE.replace(b"red", "größe".encode("latin-1")), "bad_json"),
    "lone-surrogate": bad(_WHOLE.replace(b"red", b"\\ud800"), "bad_json"),
    "encoded-surrogate": bad(_WHOLE.replace(b"red", b"\xed\xa0\x80"), "bad_json"),
    "raw-newline-in-text": bad(_WHOLE.replace(b"red", b"r\nd"), "bad_json"),
    "deep-nesting": bad(b'{"a":' + b"[" * 100_000, "bad_json"),
    "array": bad([RECORD], "bad_json"),
    "number": bad(b"5", "bad_json"),
    "text": bad(b'"what is it"', "bad_json"),
    "null": bad(b"null", "bad_json"),
    "two-objects": bad(_WHOLE + b"\n" + _WHOLE, "bad_json"),
    "trailing-comma": bad(_WHOLE[:-1] + b",}", "bad_json"),
    "number-of-5000-digits": bad(_WHOLE[:-1] + b',"id":' + b"9" * 5000 + b"}", "bad_json"),
    "html": bad(b"<html><body>404 Not Found</body></html>", "bad_json"),
    "compressed": bad(gzip.compress(_WHOLE), "bad_json"),
    "17-mib": bad(lambda: RECORD | {"more": "a" * (17 << 20)}, "too_large"),
    "field-twice": bad(_WHOLE[:-1] + b', "chosen": "a green line"}', "bad_json"),
    "turn-with-a-value-twice": bad(
        b'{"conversations": [{"from": "human", "value": "a", "value": "b"}, {"from": "gpt", "value": "c"}]}', "bad_json"
    ),
    "byte-order-mark": sound(b"\xef\xbb\xbf" + _WHOLE),
    "utf-16": sound(json.dumps(RECORD).encode("utf-16")),
    "nan-beside": sound(_WHOLE[:-1] + b', "score": NaN, "other": -Infinity}'),
    "many-fields": sound(RECORD | {f"field {n}": [n] * 10 for n in range(2000)}),
    "white-space-around": sound(b"\n\t " + _WHOLE + b" \r\n"),
}

FIELDS = {
    "nothing": bad({}, "missing_field"),
    "no-question": bad(without("question"), "missing_field"),
    "no-chosen": bad(without("chosen"), "missing_field"),
    "no-rejected": bad(without("rejected"), "missing_field"),
    "field-in-capitals": bad(without("chosen") | {"Chosen": "a"}, "missing_field"),
    "number-for-an-answer": bad(RECORD | {"chosen": 5}, "missing_field"),
    "null-for-an-answer": bad(RECORD | {"rejected": None}, "missing_field"),
    "list-for-an-answer": bad(RECORD | {"chosen": ["a red circle"]}, "missing_field"),
    "list-for-a-question": bad(RECORD | {"question": [{"type": "text"}]}, "missing_field"),
    "empty-question": bad(RECORD | {"question": ""}, "empty_question"),
    "blank-question": bad(RECORD | {"question": " \u3000\n"}, "empty_question"),
    "question-of-a-mark": bad(RECORD | {"question": "<image>\n"}, "empty_question"),
    "empty-chosen": bad(RECORD | {"chosen": ""}, "empty_answer"),
    "blank-rejected": bad(RECORD | {"rejected": "\t\r\n"}, "empty_answer"),
    "same-answers": bad(RECORD | {"rejected": RECORD["chosen"]}, "identical_answers"),
    "same-answers-but-for-blanks": bad(RECORD | {"rejected": f" {RECORD['chosen']}\n"}, "identical_answers"),
    "pair-and-conversation": bad(RECORD | talk(*TURNS), "ambiguous_fields"),
    "mark-in-an-answer": bad(RECORD | {"chosen": "<image> a"}, "misplaced_image_mark"),
    "two-marks": bad(RECORD | {"question": "<image><image> what"}, "misplaced_image_mark"),
    "mark-without-image": bad(RECORD | {"question": "<image>\nwhat"}, "missing_image", image=False),
    "chat-tokens-in-text": sound(RECORD | {"chosen": "<|im_end|>\n<|im_start|>user\nmore<|endoftext|>"}),
    "nul-in-text": sound(RECORD | {"question": "what\0is\u0007 it \u200b\u202e"}),
    "any-script": sound(RECORD | {"question": "Größe? 大きさは 👩\u200d🚀 e\u0301", "chosen": "\u200b"}),
    "no-image": sound(RECORD, image=False),
}

CONVERSATIONS = {
    "no-turns": bad(talk(), "bad_turns"),
    "odd-turns": bad(talk(*TURNS, _HUMAN), "bad_turns"),
    "answer-first": bad(talk(_GPT, _HUMAN), "bad_turns"),
    "unknown-role": bad(talk(_HUMAN, _GPT | {"from": "assistant"}), "bad_turns"),
    "role-of-a-megabyte": bad(lambda: talk(_HUMAN, _GPT | {"from": "g" * (1 << 20)}), "bad_turns"),
    "role-is-a-list": bad(talk(_HUMAN, _GPT | {"from": ["gpt"]}), "bad_turns"),
    "text-for-turns": bad({"conversations": "what is it"}, "bad_turns"),
    "object-for-turns": bad({"conversations": _HUMAN}, "bad_turns"),
    "turn-is-text": bad(talk("what is it", "a circle"), "bad_turns"),
    "turn-without-value": bad(talk(_HUMAN, {"from": "gpt"}), "bad_turns"),
    "turn-with-a-number": bad(talk(_HUMAN, _GPT | {"value": 5}), "bad_turns"),
    "empty-answer": bad(talk(_HUMAN, _GPT | {"value": " "}), "empty_answer"),
    "empty-question": bad(talk(_HUMAN | {"value": ""}, _GPT), "empty_question"),
    "mark-in-an-answer": bad(talk(_HUMAN, _GPT | {"value": "<image> a"}), "misplaced_image_mark"),
    "mark-in-a-later-turn": bad(talk(*TURNS, _HUMAN | {"value": "<image> b"}, _GPT), "misplaced_image_mark"),
    "in-a-run-on-pairs": bad(talk(*TURNS), "not_a_pair", seen="run"),
}

LENGTHS = {
    "question-of-5-mb": long(lambda: RECORD | {"question": "what is it? " * 420_000}, "prompt_too_long"),
    "question-of-one-word": long(lambda: RECORD | {"question": "a" * (1 << 20)}, "prompt_too_long"),
    "chosen-of-1-mb": long(lambda: RECORD | {"chosen": "it is red. " * 100_000}, "chosen_too_long"),
    "rejected-of-1-mb": long(lambda: RECORD | {"rejected": "it is red. " * 100_000}, "rejected_too_long"),
    "answer-of-a-letter": sound(RECORD | {"chosen": "a", "rejected": "b"}),
}
