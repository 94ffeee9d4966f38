"""The page of `pivot probe vqa`: the paper's table, each benchmark's score, and how models differ in it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pivot_megatron.probe.score_sections import DIFFERENCES, NOT_ADJUSTED
from pivot_megatron.probe.vqa import VqaReport, change
from pivot_megatron.probe.vqa_results import Result
from pivot_megatron.report.facts import short_names, told
from pivot_megatron.report.intervals import Row, change_row, interval_table
from pivot_megatron.report.page import Forest, Page, Section, Table
from pivot_megatron.report.panels import colours

_NO_ERRORS = "A score without an interval is of a benchmark for which lmms-eval gives no standard error."


def vqa_page(report: VqaReport, versions: Mapping[str, str]) -> Page:
    names = short_names(report.labels)
    # A browser keeps an em space, by which a benchmark stands below its group.
    rows = [[row[0].replace("  ", "\u2003"), *row[1:]] for row in report.rows()]
    words = [0, *range(3, len(rows[0]), 2)]
    sections = [Section("Benchmarks", [Table(rows, words)], "In per cent of a full score.", " ".join(report.notes()))]
    if scores := _scores(report, names):
        forest = Forest(interval_table(scores, []), "model", "score, %", "benchmark")
        sections.append(Section("Scores", [forest], note=_NO_ERRORS))
    if changes := _changes(report, names):
        forest = Forest(interval_table(changes, ["verdict"], zero=True), "model", "points", "benchmark", signed=True)
        note = f"Taken as if samples were drawn apart, so wider than need be. {NOT_ADJUSTED}"
        sections.append(Section(f"Differences from {names[0]}", [forest], DIFFERENCES, note))
    if report.suite.published:
        paper = Table(report.published(), (0,))
        sections.append(Section("The paper", [paper], "Its averages over all benchmarks, measured by its authors."))
    return Page("Visual question answering", _lead(report, names), sections, told(report.settings()), versions)


def _lead(report: VqaReport, names: list[str]) -> str:
    """The models' averages, or how much of them is missing."""
    said = []
    for name, model in zip(names, report.models, strict=True):
        average = model.overall(report.suite)
        missing = f"no average, for {len(model.missing)} of {len(report.suite.benchmarks)} benchmarks are missing"
        said.append(f"{name} {missing if average is None else f'{average:.2f} %'}")
    return f"Average of the groups: {'; '.join(said)}."


def _scores(report: VqaReport, names: list[str]) -> list[Row]:
    slots = colours([str(n) for n in range(len(names))])
    rows = []
    for benchmark in report.suite.benchmarks:
        for n, (name, model) in enumerate(zip(names, report.models, strict=True)):
            if found := model.results.get(benchmark):
                rows.append(_row(benchmark, name, slots[str(n)], found))
    return rows


def _row(benchmark: str, name: str, slot: int, found: Result) -> Row:
    interval = found.interval
    low, high = (-math.inf, math.inf) if interval is None else (max(interval.low, 0.0), min(interval.high, 100.0))
    return Row(benchmark, name, slot, found.score, low, high)


def _changes(report: VqaReport, names: list[str]) -> list[Row]:
    first, *others = report.models
    rows = []
    for benchmark, base in ((one, first.results.get(one)) for one in report.suite.benchmarks):
        for name, model in zip(names[1:], others, strict=True):
            found = model.results.get(benchmark)
            if base is None or found is None:
                continue
            points, interval = change(base, found)
            low, high = (-math.inf, math.inf) if interval is None else (interval.low / 100, interval.high / 100)
            rows.append(change_row(benchmark, name, points / 100, low, high))
    return rows
