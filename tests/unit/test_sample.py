"""Reading a row: what is kept, and which broken rows are named how."""

import json
import pickle
from typing import Any

import pytest

from pivot_megatron.data.sample import BadSample, Conversation, Pair, Turn, parse_sample

PAIR = {"question": "<image>\nWhat is it?", "chosen": "A cat.", "rejected": "A dog."}
HUMAN = {"from": "human", "value": "What is it?"}
GPT = {"from": "gpt", "value": "A cat."}


def parse(record: Any, image: bytes | None = b"jpeg") -> Any:
    return parse_sample("k", json.dumps(record).encode(), image)


def test_pair_keeps_text_and_other_fields() -> None:
    sample = parse({**PAIR, "chosen": " A cat.\n", "label": "cat", "task": "scene"})
    assert sample == Pair(
        "k", b"jpeg", "<image>\nWhat is it?", " A cat.\n", "A dog.", {"label": "cat", "task": "scene"}
    )


def test_conversation_keeps_turns_and_other_fields() -> None:
    sample = parse({"id": 7, "conversations": [HUMAN, GPT, HUMAN, GPT]}, None)
    user, assistant = Turn("user", "What is it?"), Turn("assistant", "A cat.")
    assert sample == Conversation("k", None, (user, assistant, user, assistant), {"id": 7})


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([PAIR], "bad_json"),
        ({"question": "q", "chosen": "a"}, "missing_field"),
        ({"question": "q", "chosen": "a", "rejected": 3}, "missing_field"),
        ({}, "missing_field"),
        ({**PAIR, "question": "<image>\n "}, "empty_question"),
        ({**PAIR, "rejected": " \n"}, "empty_answer"),
        ({**PAIR, "rejected": "A cat. "}, "identical_answers"),
        ({**PAIR, "conversations": [HUMAN, GPT]}, "ambiguous_fields"),
        ({**PAIR, "chosen": "See <image>"}, "misplaced_image_mark"),
        ({**PAIR, "question": "<image>\n<image>\nWhich?"}, "misplaced_image_mark"),
        ({"conversations": []}, "bad_turns"),
        ({"conversations": "hello"}, "bad_turns"),
        ({"conversations": [HUMAN]}, "bad_turns"),
        ({"conversations": [GPT, HUMAN]}, "bad_turns"),
        ({"conversations": [HUMAN, HUMAN]}, "bad_turns"),
        ({"conversations": [HUMAN, "A cat."]}, "bad_turns"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": " "}]}, "empty_answer"),
        ({"conversations": [{"from": "human", "value": ""}, GPT]}, "empty_question"),
    ],
)
def test_bad_rows_are_named(record: Any, reason: str) -> None:
    with pytest.raises(BadSample) as caught:
        parse(record)
    assert (caught.value.key, caught.value.reason) == ("k", reason)
    assert caught.value.detail


def test_mark_without_image_is_bad_and_no_mark_is_text_only() -> None:
    with pytest.raises(BadSample) as caught:
        parse(PAIR, None)
    assert caught.value.reason == "missing_image"
    assert parse({**PAIR, "question": "What is two plus two?"}, None).image is None


@pytest.mark.parametrize("raw", [b"{", b"\xff\xfe{}", b'{"question": "\\ud800"}', b"[" * 100_000])
def test_bytes_that_are_no_json(raw: bytes) -> None:
    with pytest.raises(BadSample) as caught:
        parse_sample("k", raw, None)
    assert caught.value.reason == "bad_json"


def test_bad_sample_survives_pickling() -> None:
    copy = pickle.loads(pickle.dumps(BadSample("k", "bad_json", "why")))
    assert (copy.key, copy.reason, copy.detail, str(copy)) == ("k", "bad_json", "why", "sample k: bad_json: why")
