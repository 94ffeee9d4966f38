"""What one row of a shard means: a preference pair or a conversation, with or without an image."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

IMAGE_MARK = "<image>"

_PAIR_FIELDS = ("question", "chosen", "rejected")
_FIELDS = frozenset((*_PAIR_FIELDS, "conversations", "from", "value"))
_ROLES: Mapping[Any, Literal["user", "assistant"]] = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True)
class Pair:
    """A question with a better and a worse answer.

    `image` holds the encoded file (JPEG, PNG, WebP), or None for a text-only row. `rejected_image` holds the rejected
    branch's own image where the preference is (also) between images. `meta` holds the row's other fields.
    """

    key: str
    image: bytes | None
    question: str
    chosen: str
    rejected: str
    meta: Mapping[str, Any]
    rejected_image: bytes | None = None


@dataclass(frozen=True)
class Conversation:
    """User and assistant turns in alternation, starting with the user and ending with the assistant."""

    key: str
    image: bytes | None
    turns: tuple[Turn, ...]
    meta: Mapping[str, Any]


Sample = Pair | Conversation


class BadSample(Exception):
    """A row that cannot be trained on. The loader stops at it and names it.

    Attributes: `key`, the sample's key; `reason`, a short snake_case category; `detail`, one line for a person.
    """

    def __init__(self, key: str, reason: str, detail: str) -> None:
        # All three reach Exception.args, so that the exception survives the pickling between loader processes.
        super().__init__(key, reason, detail)
        self.key = key
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"sample {self.key}: {self.reason}: {self.detail}"


def parse_sample(key: str, json_bytes: bytes, image: bytes | None, rejected_image: bytes | None = None) -> Sample:
    """Read one row.

    `json_bytes` is a JSON object with `question`, `chosen`, `rejected` (a pair) or with `conversations`, a list of
    `{"from": "human"|"gpt", "value": str}` (the LLaVA form). Texts are kept as they stand.

    Raises BadSample with reason `bad_json`, `missing_field`, `ambiguous_fields`, `empty_question`, `empty_answer`,
    `identical_answers`, `bad_turns`, `misplaced_image_mark` or `missing_image`.
    """
    record = _load(key, json_bytes)
    has_answers = "chosen" in record or "rejected" in record
    if rejected_image is not None:
        _check_rejected_image(key, record, image)
    if "conversations" not in record:
        return _pair(key, record, image, rejected_image)
    if has_answers:
        raise BadSample(key, "ambiguous_fields", "expected a pair or a conversation, found fields of both")
    return _conversation(key, record, image)


def require_preference(sample: Sample) -> None:
    """Raises BadSample with reason `identical_answers` for a pair of which neither answers nor images differ; this needs the
    images' bytes."""
    if not isinstance(sample, Pair) or sample.image != sample.rejected_image:
        return
    if sample.chosen.strip() == sample.rejected.strip():
        raise BadSample(sample.key, "identical_answers", "both answers and both images are the same")


def _load(key: str, json_bytes: bytes) -> dict[str, Any]:
    try:
        record = json.loads(json_bytes, object_pairs_hook=_once)
        # A lone surrogate is legal in JSON and fatal in every tokenizer; better to find it here than mid-run.
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise BadSample(key, "bad_json", str(error)) from error
    if not isinstance(record, dict):
        raise BadSample(key, "bad_json", f"expected an object, found {type(record).__name__}")
    return record


def _once(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises ValueError where a text is there twice: nobody knows which one is meant."""
    found = dict(fields)
    if len(found) < len(fields):
        names = [name for name, _ in fields]
        if twice := [name for name in found if name in _FIELDS and names.count(name) > 1]:
            raise ValueError(f"expected every field once, found '{twice[0]}' twice")
    return found


def _check_rejected_image(key: str, record: Mapping[str, Any], image: bytes | None) -> None:
    if "conversations" in record:
        raise BadSample(key, "ambiguous_fields", "expected one image beside a conversation, found a rejected one too")
    if image is None:
        raise BadSample(key, "missing_image", "expected the chosen image beside the rejected one, found none")


def _pair(key: str, record: Mapping[str, Any], image: bytes | None, rejected_image: bytes | None) -> Pair:
    for name in _PAIR_FIELDS:
        if not isinstance(record.get(name), str):
            found = type(record[name]).__name__ if name in record else "nothing"
            raise BadSample(key, "missing_field", f"expected text in '{name}', found {found}")
    question, chosen, rejected = (str(record[name]) for name in _PAIR_FIELDS)
    if not question.replace(IMAGE_MARK, "").strip():
        raise BadSample(key, "empty_question", "'question' holds no text")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer.strip():
            raise BadSample(key, "empty_answer", f"'{name}' holds no text")
    if chosen.strip() == rejected.strip() and rejected_image is None:
        raise BadSample(key, "identical_answers", "'chosen' and 'rejected' are the same: nothing to prefer")
    _check_image_marks(key, (question,), (chosen, rejected), image)
    meta = {name: value for name, value in record.items() if name not in _PAIR_FIELDS}
    return Pair(key, image, question, chosen, rejected, meta, rejected_image)


def _conversation(key: str, record: Mapping[str, Any], image: bytes | None) -> Conversation:
    rows = record["conversations"]
    if not isinstance(rows, list) or not rows or len(rows) % 2:
        found = f"{len(rows)} turns" if isinstance(rows, list) else type(rows).__name__
        raise BadSample(key, "bad_turns", f"expected a list of human and gpt turns in pairs, found {found}")
    turns = tuple(_turn(key, position, row) for position, row in enumerate(rows))
    by_role = {role: tuple(turn.text for turn in turns if turn.role == role) for role in ("user", "assistant")}
    _check_image_marks(key, by_role["user"], by_role["assistant"], image)
    if any(IMAGE_MARK in text for text in by_role["user"][1:]):
        raise BadSample(key, "misplaced_image_mark", f"{IMAGE_MARK} must stand before the first answer")
    meta = {name: value for name, value in record.items() if name != "conversations"}
    return Conversation(key, image, turns, meta)


def _turn(key: str, position: int, row: Any) -> Turn:
    if not isinstance(row, dict) or not isinstance(row.get("value"), str):
        raise BadSample(key, "bad_turns", f"turn {position}: expected an object with 'from' and text in 'value'")
    expected = "gpt" if position % 2 else "human"
    if row.get("from") != expected:
        raise BadSample(
            key, "bad_turns", f"turn {position}: expected from '{expected}', found {_short(row.get('from'))}"
        )
    if not row["value"].strip():
        reason = "empty_answer" if expected == "gpt" else "empty_question"
        raise BadSample(key, reason, f"turn {position}: 'value' holds no text")
    return Turn(_ROLES[expected], row["value"])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _check_image_marks(key: str, asked: Sequence[str], answered: Sequence[str], image: bytes | None) -> None:
    marks = sum(text.count(IMAGE_MARK) for text in asked)
    if marks > 1 or any(IMAGE_MARK in text for text in answered):
        detail = f"expected {IMAGE_MARK} at most once and never in an answer: a sample has one image"
        raise BadSample(key, "misplaced_image_mark", detail)
    if marks and image is None:
        raise BadSample(key, "missing_image", f"the text holds {IMAGE_MARK} and the shard holds no image for this key")
