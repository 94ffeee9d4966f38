"""What the demo found: the reports of the probes, the exports, and the differences between models in every measure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pivot_megatron.probe.classes import LinearReport
from pivot_megatron.probe.gradcam_report import GradcamReport
from pivot_megatron.probe.interval import Interval, change_text
from pivot_megatron.probe.segment import SegmentationReport
from pivot_megatron.probe.table import Score, against_first, aligned
from pivot_megatron.recipe.export_checks import ExportCheck
from pivot_megatron.recipe.small_tasks import TaskReport

BLIND = "blind"
"""The most frequent answer to a question, without the image."""
INIT = "init"
"""The encoder as it was made, untrained."""

COMPARED = (("base", INIT), ("sft", "base"), ("dpo", "base"), ("dpo", "sft"))
"""What is held against what: each against the one it came from, and DPO against its control."""


@dataclass(frozen=True)
class Change:
    """`model` less `against`, a share, on the same samples and draws."""

    measure: str
    model: str
    against: str
    value: float
    interval: Interval


@dataclass(frozen=True)
class DemoReport:
    """`labels`: the linear probe, by the name of its images. `seconds`: by phase. Models and encoders have the demo's
    names."""

    answers: TaskReport
    blind: Score
    labels: Mapping[str, LinearReport]
    masks: SegmentationReport
    gradients: GradcamReport
    exports: Sequence[ExportCheck]
    seconds: Mapping[str, float]

    def measures(self) -> dict[str, list[Score]]:
        """Scores by measure."""
        return {
            "answers": [self.blind, *self.answers.answers()],
            "preferences": self.answers.preferences(),
            **{name: list(report.scores) for name, report in self.labels.items()},
            "masks": list(self.masks.scores),
        }

    def changes(self) -> list[Change]:
        """Of every measure, each of COMPARED that it has, as the probes hold a second model against the first."""
        found = []
        for measure, scores in self.measures().items():
            by_name = {score.encoder: score for score in scores}
            for model, against in COMPARED:
                if {model, against} <= by_name.keys():
                    ((value, interval),) = against_first([by_name[against], by_name[model]])
                    found.append(Change(measure, model, against, value, interval))
        return found

    def rows(self) -> list[list[str]]:
        """Heads, then a row a model: every measure in per cent with its 95 % interval."""
        measures = self.measures()
        names = dict.fromkeys([BLIND, INIT, *(score.encoder for scores in measures.values() for score in scores)])
        cells = {
            (
                measure,
                score.encoder,
            ): f"{100 * score.mean:.1f} [{100 * score.shown.low:.1f}, {100 * score.shown.high:.1f}]"
            for measure, scores in measures.items()
            for score in scores
        }
        return [["", *measures], *([name, *(cells.get((measure, name), "") for measure in measures)] for name in names)]

    def figures(self) -> dict[str, float]:
        """For a tracker, as the probes tell theirs; those of the linear probe by the name of its images."""
        labels = {f"{name}/{key}": value for name, one in self.labels.items() for key, value in one.figures().items()}
        return self.answers.figures() | labels | self.masks.figures()

    def as_text(self) -> str:
        changes = [
            [one.measure, f"{one.model} - {one.against}", change_text(one.value, one.interval)]
            for one in self.changes()
        ]
        exports = [
            [
                f"export {one.name}",
                "loads" if one.loaded else "DOES NOT LOAD",
                f"max difference {one.max_difference:.1e}",
                f"{one.changed_tensors} tensors changed, {one.unchanged_tensors} unchanged",
            ]
            for one in self.exports
        ]
        return "\n\n".join(aligned(rows, left=range(len(rows[0]))) for rows in (self.rows(), changes, exports))

    def as_json(self, **facts: Any) -> str:
        """Each probe's report as its command writes it."""
        told = {
            **facts,
            "answers": json.loads(self.answers.as_json()),
            "blind": {"mean": self.blind.mean, "interval": self.blind.interval.as_record()},
            "linear": {name: json.loads(one.as_json()) for name, one in self.labels.items()},
            "segmentation": json.loads(self.masks.as_json()),
            "gradcam": json.loads(self.gradients.as_json()),
            "differences": [{**asdict(one), "interval": one.interval.as_record()} for one in self.changes()],
            "exports": [asdict(one) for one in self.exports],
            "seconds": dict(self.seconds),
            "table": self.as_text(),
        }
        return json.dumps(told, indent=2, default=str) + "\n"
