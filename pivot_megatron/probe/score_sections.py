"""Scores of several encoders as sections of a page: intervals, differences from the first, and the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pivot_megatron.probe.table import Score, against_first, table_rows
from pivot_megatron.report.facts import short_names
from pivot_megatron.report.intervals import Line, Row, change_row, interval_table, verdicts_told
from pivot_megatron.report.page import Forest, Section, Table
from pivot_megatron.report.panels import colours

DIFFERENCES = "In percentage points. A difference whose interval holds zero is marked \u201cinside the noise\u201d."
NOT_ADJUSTED = "Intervals are not adjusted for the number of comparisons."


@dataclass(frozen=True)
class Told:
    """`measure`: of one word or two, as it heads a table. `lead`: what it is; `note`: what its intervals cover."""

    measure: str
    lead: str
    note: str


def score_sections(told: Told, scores: Sequence[Score], line: Line | None = None) -> list[Section]:
    """`line`: what all scores are seen against. Of one encoder there are no differences."""
    names = short_names([score.encoder for score in scores])
    slots = colours([str(n) for n in range(len(scores))])
    rows = [
        score_row("", name, slots[str(n)], score) for n, (name, score) in enumerate(zip(names, scores, strict=True))
    ]
    intervals = interval_table(rows, list(scores[0].columns), lines={} if line is None else {"": line})
    title = told.measure[:1].upper() + told.measure[1:]
    sections = [Section(title, [Forest(intervals, "encoder", f"{told.measure}, %")], told.lead, told.note)]
    if len(scores) > 1:
        changes = interval_table(change_rows("", names, scores), ["verdict"], zero=True)
        forest = Forest(changes, "encoder", "points", signed=True)
        sections.append(Section(f"{title}: differences from {names[0]}", [forest], DIFFERENCES, NOT_ADJUSTED))
    rows_told = table_rows(told.measure, scores)
    sections.append(Section(f"{title}: table", [Table(rows_told, (0, len(rows_told[0]) - 1))], "In percent."))
    return sections


def score_row(group: str, name: str, slot: int, score: Score) -> Row:
    low, high = 100 * score.shown.low, 100 * score.shown.high
    return Row(group, name, slot, 100 * score.mean, low, high, list(score.columns.values()))


def change_rows(group: str, names: Sequence[str], scores: Sequence[Score]) -> list[Row]:
    """Of each score after the first its difference from the first. `names`: of `scores`, as a page has them."""
    return [
        change_row(group, name, change, interval.low, interval.high)
        for name, (change, interval) in zip(names[1:], against_first(scores), strict=True)
    ]


def scores_told(told: Told, scores: Sequence[Score]) -> str:
    """A sentence that may stand at the head of a page."""
    names = short_names([score.encoder for score in scores])
    if len(scores) > 1:
        return verdicts_told(change_rows("", names, scores), names[0])
    (score,) = scores
    interval = (
        f" (95 % interval {100 * score.shown.low:.2f} to {100 * score.shown.high:.2f})" if score.interval.finite else ""
    )
    return f"{names[0]}: {told.measure} {100 * score.mean:.2f} %{interval}."
