"""Held-out pairs and how answers to them are scored."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pivot_megatron.data.sample import IMAGE_MARK, Pair
from pivot_megatron.data.shards import open_shards
from pivot_megatron.errors import UserError


@dataclass(frozen=True)
class HeldOut:
    """One pair with an image. `question` carries no image mark; `label` is the short form of the right answer."""

    task: str
    image: bytes
    question: str
    chosen: str
    rejected: str
    label: str


@dataclass(frozen=True)
class AnswerScore:
    """How many of a model's answers to one task's held-out questions are right."""

    model: str
    task: str
    correct: int
    total: int


@dataclass(frozen=True)
class PreferenceScore:
    """How many held-out pairs of one task a model ranks right, and its mean margin: nats, chosen less rejected."""

    model: str
    task: str
    correct: int
    total: int
    mean_margin: float


def read_held_out(shards: Path) -> list[HeldOut]:
    """Raises UserError for a row without image, task or label."""
    reader = open_shards(shards)
    return [_held_out(reader.read(i), shards) for i in range(len(reader))]


def _held_out(sample: object, shards: Path) -> HeldOut:
    if not (isinstance(sample, Pair) and sample.image is not None and {"task", "label"} <= sample.meta.keys()):
        raise UserError(f"{shards}: expected pairs with image, task and label, found another row; write them again")
    question = sample.question.replace(IMAGE_MARK, "").strip()
    return HeldOut(
        sample.meta["task"], sample.image, question, sample.chosen, sample.rejected, str(sample.meta["label"])
    )


def is_right(answer: str, label: str) -> bool:
    """Whether the answer holds the label as a word of its own, in any case; a read text only in its own capitals.

    Questions have several answer templates, of which a model may take any, so equality with the chosen answer would be
    too strict.
    """
    # A read letter A is not the article of "It is a star."
    flags = 0 if label.isupper() else re.IGNORECASE
    return re.search(rf"(?<!\w){re.escape(label)}(?!\w)", answer, flags) is not None


def answer_scores(model: str, pairs: Sequence[HeldOut], answers: Sequence[str]) -> list[AnswerScore]:
    """One score a task, tasks in order of first appearance."""
    right: dict[str, list[bool]] = {}
    for pair, answer in zip(pairs, answers, strict=True):
        right.setdefault(pair.task, []).append(is_right(answer, pair.label))
    return [AnswerScore(model, task, sum(found), len(found)) for task, found in right.items()]


def preference_scores(
    model: str, pairs: Sequence[HeldOut], logprobs: Sequence[tuple[float, float]]
) -> list[PreferenceScore]:
    """`logprobs`: of the whole chosen and the whole rejected answer, in nats. A tie is not ranked right."""
    margins: dict[str, list[float]] = {}
    for pair, (chosen, rejected) in zip(pairs, logprobs, strict=True):
        margins.setdefault(pair.task, []).append(chosen - rejected)
    return [
        PreferenceScore(model, task, sum(m > 0 for m in found), len(found), math.fsum(found) / len(found))
        for task, found in margins.items()
    ]


def blind_answers(known: Iterable[tuple[str, str]], asked: Sequence[str]) -> list[str]:
    """What someone who sees no image would say: the label most often right for the same question in `known`.

    `known`: (question, label) of training samples. A question that is not among them gets the label most frequent of all.
    """
    labels: defaultdict[str, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    for question, label in known:
        labels[question][label] += 1
        overall[label] += 1
    return [_most_common(labels.get(question, overall)) for question in asked]


def _most_common(counts: Counter[str]) -> str:
    return min(counts, key=lambda label: (-counts[label], label)) if counts else ""
