"""What became of a schedule: a row a phase, as JSON and as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pivot_megatron.probe.interval import Interval, change_text
from pivot_megatron.probe.table import aligned, figure


@dataclass(frozen=True)
class Probed:
    """Accuracy (a share) of the encoder that a phase left, and its difference from the one that the phase found. `in_all`: its
    difference from the schedule's first encoder; None where that is the one that the phase found."""

    accuracy: float
    interval: Interval
    difference: float
    difference_interval: Interval
    in_all: float | None = None
    in_all_interval: Interval | None = None

    def against_the_start(self) -> tuple[float, Interval]:
        """Its difference from the schedule's first encoder."""
        if self.in_all is None or self.in_all_interval is None:
            return self.difference, self.difference_interval
        return self.in_all, self.in_all_interval


@dataclass(frozen=True)
class PhaseResult:
    """`encoder`: the Hugging Face folder of the encoder as the phase left it; None where, bit for bit, it is as the phase found
    it. `loss`, `reward_margin`: means over the last tenth of the steps that were applied."""

    name: str
    objective: str
    head: str
    projector: bool
    steps: int
    pairs: int
    seconds: float
    loss: float
    reward_margin: float | None
    encoder: str | None
    probed: Probed | None

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> PhaseResult:
        probed = told["probed"]
        if probed is not None:
            intervals = {name: Interval(**value) for name, value in probed.items() if isinstance(value, Mapping)}
            probed = Probed(**{**probed, **intervals})
        return cls(**{**told, "probed": probed})


def as_json(name: str, results: Sequence[PhaseResult], **facts: Any) -> str:
    return json.dumps({"name": name, "phases": [asdict(result) for result in results], **facts}, indent=2) + "\n"


def figures(results: Sequence[PhaseResult]) -> dict[str, float]:
    """Numbers for a tracker by name, `PHASE/FIGURE`; accuracies are shares."""
    found: dict[str, float] = {}
    for result in results:
        own = {"steps": result.steps, "pairs": result.pairs, "loss": result.loss, "reward_margin": result.reward_margin}
        found |= {f"{result.name}/{name}": value for name, value in own.items() if value is not None}
        if (probed := result.probed) is not None:
            found |= figure(f"{result.name}/accuracy", probed.accuracy, probed.interval)
            found |= figure(f"{result.name}/difference", probed.difference, probed.difference_interval)
            if probed.in_all is not None:
                found |= figure(f"{result.name}/in_all", *probed.against_the_start())
    return found


def table_rows(results: Sequence[PhaseResult]) -> list[tuple[str, ...]]:
    """Heads, then a row a phase."""
    heads = (
        "phase",
        "objective",
        "head",
        "steps",
        "minutes",
        "loss",
        "margin",
        "accuracy",
        "against the phase's start",
    )
    return [heads, *(_row(result) for result in results)]


def as_table(results: Sequence[PhaseResult]) -> str:
    rows = table_rows(results)
    return aligned(rows, left=(0, 1, 2, len(rows[0]) - 1))


def _row(result: PhaseResult) -> tuple[str, ...]:
    probed = result.probed
    changed = "encoder as it was, bit for bit" if result.encoder is None else ""
    if probed is not None:
        changed = change_text(probed.difference, probed.difference_interval)
    return (
        result.name,
        result.objective,
        result.head,
        str(result.steps),
        f"{result.seconds / 60:.1f}",
        f"{result.loss:.4f}",
        "" if result.reward_margin is None else f"{result.reward_margin:+.3f}",
        "" if probed is None else f"{100 * probed.accuracy:.2f}",
        changed,
    )
