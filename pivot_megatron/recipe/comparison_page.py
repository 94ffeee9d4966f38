"""The page of `pivot compare`: what each variant does to the encoder, at every sample count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from markupsafe import Markup

from pivot_megatron.probe.score_sections import DIFFERENCES, NOT_ADJUSTED, change_rows, score_row
from pivot_megatron.probe.table import table_rows
from pivot_megatron.recipe.comparison import START, Measured
from pivot_megatron.report.interval_chart import IntervalLine, Titles, interval_chart
from pivot_megatron.report.intervals import IntervalTable, Line, interval_table, verdicts_told
from pivot_megatron.report.page import Charts, Forest, Page, Section, Table
from pivot_megatron.report.panels import Panel, colours

_BEGUN = "what all began from"
_COVERED = "Intervals are for other seeds and other test samples alike; a single seed's accuracy stands in a column of its own."


def comparison_page(
    measured: Sequence[Measured],
    seeds: Sequence[int],
    settings: Mapping[str, str],
    versions: Mapping[str, str],
    more: Sequence[Section] = (),
) -> Page:
    """A few sections for each measure, in order of appearance, and what else there is to see of the runs."""
    first, *others = (score.encoder for score in measured[0].variants)
    sections: list[Section] = []
    for measure in dict.fromkeys(one.measure for one in measured):
        sections += _sections([one for one in measured if one.measure == measure], seeds)
    title = f"{first} against {', '.join(others)}"
    return Page(title, verdicts_told(_changes(measured).rows, first), [*sections, *more], settings, versions)


def _sections(measured: Sequence[Measured], seeds: Sequence[int]) -> list[Section]:
    """Of one measure, at every count."""
    measure, first = measured[0].measure, measured[0].variants[0].encoder
    title = measure[:1].upper() + measure[1:]
    slots = colours([START, *(score.encoder for score in measured[0].variants)])
    changes = Forest(_changes(measured), "variant", "points", "samples", signed=True)
    found = [
        Section(title, [_means(measured, seeds, slots)], note=_COVERED),
        Section(f"{title}: differences from {first}", [changes], DIFFERENCES, NOT_ADJUSTED),
        Section(f"{title}: table", [_table(measured)], "In percent."),
    ]
    if len(counted := [one for one in measured if one.count is not None]) > 1:
        found.insert(1, _efficiency(counted, slots))
    return found


def _group(one: Measured) -> str:
    return "all" if one.count is None else f"{one.count:,}"


def _means(measured: Sequence[Measured], seeds: Sequence[int], slots: Mapping[str, int]) -> Forest:
    rows = []
    for one in measured:
        for score in one.variants:
            row = score_row(_group(one), score.encoder, slots[score.encoder], score)
            rows.append(replace(row, cells=[f"{100 * seed:.2f}" for seed in score.record["seeds"]]))
    lines = {_group(one): Line(_BEGUN, 100 * one.start.mean) for one in measured if one.start}
    table = interval_table(rows, [f"seed {seed}" for seed in seeds], lines=lines)
    return Forest(table, "variant", "mean, %", "samples")


def _changes(measured: Sequence[Measured]) -> IntervalTable:
    rows = []
    for one in measured:
        rows += change_rows(_group(one), [score.encoder for score in one.variants], one.variants)
    return interval_table(rows, ["verdict"], zero=True)


def _efficiency(measured: Sequence[Measured], slots: Mapping[str, int]) -> Section:
    """The measure over the number of samples. The start is the same at every count."""
    measure, start = measured[0].measure, measured[0].start
    by_count = sorted(measured, key=lambda one: one.count or 0)
    lines = []
    for n, variant in enumerate(measured[0].variants):
        scores = [(one.count or 0, one.variants[n]) for one in by_count]
        points = [(float(count), 100 * s.mean, 100 * s.shown.low, 100 * s.shown.high) for count, s in scores]
        lines.append(IntervalLine(variant.encoder, points, slots[variant.encoder]))
    title = f"{measure} over the number of samples"
    svg = interval_chart(lines, Titles(title, "samples", f"{measure}, %"), 100 * start.mean if start else None)
    legend = [(line.name, line.slot, f"{line.points[0][1]:.2f}", f"{line.points[-1][1]:.2f}") for line in lines]
    panel = Panel(f"{title}, with 95 % intervals", Markup(svg), legend)
    note = "Bars at one count are set apart to be seen."
    if start:
        note = f"The dashed line is {_BEGUN}, {100 * start.mean:.2f} %. {note}"
    return Section(f"{measure[:1].upper()}{measure[1:]}: data efficiency", [Charts([panel], wide=True)], note=note)


def _table(measured: Sequence[Measured]) -> Table:
    first = measured[0].variants[0].encoder
    rows = [["samples", "encoder", "mean", "95 % interval", "against the start", f"against {first}"]]
    for one in measured:
        against_first = {row[0]: row for row in table_rows("", one.variants)[1:]}
        for row in table_rows("", one.scores)[1:]:
            against_start = row[-1] if one.start else ""
            rows.append([_group(one), *row[:-1], against_start, against_first.get(row[0], [""])[-1]])
    return Table(rows, (0, 1, 4, 5))
