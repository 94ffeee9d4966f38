"""What several models' gradients fall on: scores over samples, and a record of each sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pivot_megatron.probe.gradients import Place
from pivot_megatron.probe.patch_grid import PatchGrid, Values
from pivot_megatron.probe.questions import Question
from pivot_megatron.probe.saliency import energy_inside, pointing_chance, points_inside
from pivot_megatron.probe.table import Score, as_json, as_records, as_table, figures

ObjectiveName = Literal["dpo", "sft"]
Measure = Literal["energy", "pointing"]


@dataclass(frozen=True)
class GradcamSettings:
    """`objectives`: each model is seen under each. `steps`: of overfitting, at `rate`. `at`: which side of the projector."""

    samples: Path
    count: int | None = None
    objectives: tuple[ObjectiveName, ...] = ("dpo",)
    steps: int = 20
    rate: float = 1e-5
    at: Place = "input"


@dataclass(frozen=True)
class Seen:
    """One question by one model under one objective. `losses`: before each step of overfitting, and where the gradient was taken.
    `cover`: of patches by the question's box, if it has one."""

    saliency: Values
    grid: PatchGrid
    losses: tuple[float, ...]
    cover: Values | None

    @cached_property
    def scores(self) -> dict[str, float]:
        """Each measure and its chance, that of an even map or of one whose maximum is anywhere; empty without a box."""
        if self.cover is None:
            return {}
        return {
            "energy": energy_inside(self.saliency, self.cover),
            "energy_chance": float(self.cover.mean()),
            "pointing": float(points_inside(self.saliency, self.cover)),
            "pointing_chance": pointing_chance(self.cover),
        }


@dataclass(frozen=True)
class Column:
    """All questions by one model under one objective."""

    label: str
    seen: tuple[Seen, ...]

    def score(self, measure: Measure) -> Score:
        """Over the questions that have a box."""
        found = [one.scores for one in self.seen if one.scores]
        values = np.array([[one[measure] for one in found]])
        chance = float(np.mean([one[f"{measure}_chance"] for one in found]))
        columns, record = {"chance": f"{100 * chance:.2f}"}, {"chance": chance}
        return Score(self.label, values, columns, record, counted=measure == "pointing")


@dataclass(frozen=True)
class GradcamReport:
    """`out`: the folder of figures and maps."""

    settings: GradcamSettings
    questions: Sequence[Question]
    columns: Sequence[Column]
    out: Path

    @property
    def boxed(self) -> int:
        return sum(question.box is not None for question in self.questions)

    def scores(self, measure: Measure) -> list[Score]:
        """By column; empty where no question has a box."""
        return [column.score(measure) for column in self.columns] if self.boxed else []

    def as_json(self, **facts: Any) -> str:
        samples = [self._record(number) for number in range(len(self.questions))]
        pointing = as_records(self.scores("pointing"))
        energy = self.scores("energy")
        return as_json(self.settings, energy, measure="energy", pointing=pointing, samples=samples, **facts)

    def figures(self) -> dict[str, float]:
        if not self.boxed:
            return {}
        return figures("energy", self.scores("energy")) | figures("pointing", self.scores("pointing"))

    def as_text(self) -> str:
        told = f"boxes: {self.boxed} of {len(self.questions)} samples; figures: {self.out}"
        if not self.boxed:
            return told
        tables = [as_table(measure, self.scores(measure)) for measure in ("energy", "pointing")]
        return "\n\n".join([*tables, told])

    def _record(self, number: int) -> dict[str, Any]:
        question = self.questions[number]
        return {
            "name": question.name,
            "question": question.pair.question,
            "chosen": question.pair.chosen,
            "rejected": question.pair.rejected,
            "box": asdict(question.box) if question.box else None,
            "figure": figure_name(number),
            "seen": [
                {
                    "encoder": column.label,
                    "map": map_name(number, place),
                    "losses": column.seen[number].losses,
                    **column.seen[number].scores,
                }
                for place, column in enumerate(self.columns)
            ],
        }


def figure_name(question: int) -> str:
    return f"{question + 1:04d}.png"


def map_name(question: int, column: int) -> str:
    return f"maps/{question + 1:04d}-{column + 1}.npy"
