"""The page of `pivot compare`: what each variant does to the encoder, at every sample count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from markupsafe import Markup

from pivot_megatron.probe.score_sections import DIFFERENCES, NOT_ADJUSTED, change_rows, score_row
from pivot_megatron.probe.table import table_rows
from pivot_megatron.recipe.comparison import Compared
from pivot_megatron.report.interval_chart import Measured, Titles, interval_chart
from pivot_megatron.report.intervals import IntervalTable, Line, interval_table, verdicts_told
from pivot_megatron.report.page import Charts, Forest, Page, Section, Table
from pivot_megatron.report.panels import Panel, colours

_COVERED = (
    "Intervals are for other seeds and other test images alike; a single seed's accuracy stands in a column of its own."
)


def comparison_page(
    compared: Sequence[Compared], seeds: Sequence[int], settings: Mapping[str, str], versions: Mapping[str, str]
) -> Page:
    slots = colours([score.encoder for score in compared[0].scores])
    changes = _changes(compared)
    first, *others = (score.encoder for score in compared[0].between())
    sections = [
        Section(
            "Accuracy",
            [_accuracy(compared, seeds, slots)],
            "A linear probe of the encoder that each variant left.",
            _COVERED,
        )
    ]
    if len(counted := [one for one in compared if one.count is not None]) > 1:
        sections.append(_efficiency(counted, slots))
    if others:
        forest = Forest(changes, "variant", "points", "samples", signed=True)
        sections.append(Section(f"Differences from {first}", [forest], DIFFERENCES, NOT_ADJUSTED))
    sections.append(Section("Table", [_table(compared)], "In percent."))
    return Page(
        f"{first} against {', '.join(others)}", verdicts_told(changes.rows, first), sections, settings, versions
    )


def _group(one: Compared) -> str:
    return "all" if one.count is None else f"{one.count:,}"


def _accuracy(compared: Sequence[Compared], seeds: Sequence[int], slots: Mapping[str, int]) -> Forest:
    rows = []
    for one in compared:
        for score in one.between():
            row = score_row(_group(one), score.encoder, slots[score.encoder], score)
            rows.append(replace(row, cells=[f"{100 * seed:.2f}" for seed in score.record["seeds"]]))
    lines = {_group(one): Line("the encoder that all began from", 100 * one.scores[0].mean) for one in compared}
    table = interval_table(rows, [f"seed {seed}" for seed in seeds], lines=lines)
    return Forest(table, "variant", "accuracy, %", "samples")


def _changes(compared: Sequence[Compared]) -> IntervalTable:
    rows = []
    for one in compared:
        rows += change_rows(_group(one), [score.encoder for score in one.between()], one.between())
    return interval_table(rows, ["verdict"], zero=True)


def _efficiency(compared: Sequence[Compared], slots: Mapping[str, int]) -> Section:
    """Accuracy over the number of samples. The start is the same at every count."""
    by_count = sorted(compared, key=lambda one: one.count or 0)
    lines = []
    for n, variant in enumerate(compared[0].between()):
        scores = [(one.count or 0, one.between()[n]) for one in by_count]
        points = [(float(count), 100 * s.mean, 100 * s.shown.low, 100 * s.shown.high) for count, s in scores]
        lines.append(Measured(variant.encoder, points, slots[variant.encoder]))
    start = 100 * compared[0].scores[0].mean
    svg = interval_chart(lines, Titles("accuracy over the number of samples", "samples", "accuracy, %"), start)
    legend = [(line.name, line.slot, f"{line.points[0][1]:.2f}", f"{line.points[-1][1]:.2f}") for line in lines]
    panel = Panel("Accuracy over the number of samples, with 95 % intervals", Markup(svg), legend)
    note = f"The dashed line is the encoder that all began from, {start:.2f} %. Bars at one count are set apart to be seen."
    return Section("Data efficiency", [Charts([panel], wide=True)], note=note)


def _table(compared: Sequence[Compared]) -> Table:
    first = compared[0].between()[0].encoder
    rows = [["samples", "encoder", "accuracy", "95 % interval", "against the start", f"against {first}"]]
    for one in compared:
        _, start, *others = table_rows("accuracy", one.scores)
        rows.append([_group(one), *start, ""])
        against_first = [row[-1] for row in table_rows("accuracy", one.between())[1:]]
        rows += [[_group(one), *row, last] for row, last in zip(others, against_first, strict=True)]
    return Table(rows, (0, 1, 4, 5))
