"""Scores of several encoders on the same samples, and how each differs from the first, as a table and as records."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from pivot_megatron.probe.interval import Interval, change_text, crossed_change, crossed_mean, wilson
from pivot_megatron.report.facts import short_names

_ODD = re.compile(r"[^-/\w.]+")


@dataclass(frozen=True)
class Score:
    """`values` `[draws, samples]`: a share of each, the same draws and samples for every encoder. `counted`: they are right (1)
    or wrong (0), or means of such, so that intervals allow for what so many samples may not have shown: that of the mean is never
    narrower than Wilson's over samples. `columns`: what else a table has of it, in its order; `record`: what else JSON has."""

    encoder: str
    values: npt.NDArray[np.float64] = field(repr=False)
    columns: Mapping[str, str]
    record: Mapping[str, Any]
    counted: bool = False

    @cached_property
    def mean(self) -> float:
        return float(self.values.mean())

    @cached_property
    def interval(self) -> Interval:
        _, found = crossed_mean(self.values)
        if not self.counted:
            return found
        samples = self.values.shape[1]
        floor = wilson(round(self.mean * samples), samples)
        return Interval(min(found.low, floor.low), max(found.high, floor.high))

    @property
    def shown(self) -> Interval:
        """The part of the interval that a share can lie in; all of it where it has no end."""
        found = self.interval
        return Interval(max(found.low, 0.0), min(found.high, 1.0)) if found.finite else found


def against_first(scores: Sequence[Score]) -> list[tuple[float, Interval]]:
    """Of each after the first, the mean of its differences from the first, value by value, with its interval."""
    return [
        (crossed_change if score.counted else crossed_mean)(score.values - scores[0].values) for score in scores[1:]
    ]


def figures(measure: str, scores: Sequence[Score]) -> dict[str, float]:
    """Shares for a tracker, by names that all trackers take: `MEASURE/ENCODER`, and of those after the first its difference as
    `MEASURE/ENCODER-FIRST`, each with `_low` and `_high` where its interval has ends."""
    names = short_names([score.encoder for score in scores])
    found: dict[str, float] = {}
    for name, score in zip(names, scores, strict=True):
        found |= figure(f"{measure}/{name}", score.mean, score.interval)
    for name, (mean, interval) in zip(names[1:], against_first(scores), strict=True):
        found |= figure(f"{measure}/{name}-{names[0]}", mean, interval)
    return found


def figure(name: str, value: float, interval: Interval) -> dict[str, float]:
    """One of `figures`."""
    name = _ODD.sub("_", name)
    return {name: value} | ({f"{name}_{end}": at for end, at in asdict(interval).items()} if interval.finite else {})


def as_json(settings: object, scores: Sequence[Score], **facts: Any) -> str:
    """`settings`: a dataclass."""
    told = {"settings": asdict(settings), **facts, **as_records(scores)}  # type: ignore[call-overload]
    return json.dumps(told, indent=2, default=str)


def as_records(scores: Sequence[Score]) -> dict[str, list[dict[str, Any]]]:
    """`scores`, and of those after the first `against_the_first`."""
    records = [
        {"encoder": score.encoder, "mean": score.mean, "interval": score.interval.as_record(), **score.record}
        for score in scores
    ]
    against = [
        {"encoder": score.encoder, "difference": mean, "interval": interval.as_record()}
        for score, (mean, interval) in zip(scores[1:], against_first(scores), strict=True)
    ]
    return {"scores": records, "against_the_first": against}


def table_rows(measure: str, scores: Sequence[Score]) -> list[list[str]]:
    """Heads, then a row an encoder, in per cent; `measure` heads the means."""
    changes = ["", *(change_text(*change) for change in against_first(scores))]
    heads = ["encoder", measure, "95 % interval", *scores[0].columns, "against the first"]
    rows = [heads]
    for score, change in zip(scores, changes, strict=True):
        interval = f"{100 * score.shown.low:.2f} - {100 * score.shown.high:.2f}" if score.interval.finite else "none"
        rows.append([score.encoder, f"{100 * score.mean:.2f}", interval, *score.columns.values(), change])
    return rows


def as_table(measure: str, scores: Sequence[Score]) -> str:
    rows = table_rows(measure, scores)
    return aligned(rows, left=(0, len(rows[0]) - 1))


def aligned(rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    """Columns of one width, those in `left` to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if n in left else text.rjust(width)
            for n, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
