"""A demo's report in its two readable forms: one self-contained page, and a short table for the terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pivot_megatron.recipe.findings import Comparison, Estimate, comparisons, measures, models
from pivot_megatron.recipe.record import (
    AnswerScore,
    DemoReport,
    Example,
    ExportCheck,
    PreferenceScore,
    ProbeScore,
)
from pivot_megatron.recipe.tables import answer_table, change_table, preference_table, probe_table
from pivot_megatron.report.intervals import INSIDE
from pivot_megatron.report.panels import Curve, colours, run_panels
from pivot_megatron.report.render import write_template

__all__ = [
    "AnswerScore",
    "DemoReport",
    "Example",
    "ExportCheck",
    "PreferenceScore",
    "ProbeScore",
    "terminal_table",
    "write_html",
]

# The panels of a run, in order, with the metrics that share one. Any other metric gets its own, behind a fold.
_PANELS = (
    ("loss",),
    ("reward_accuracy",),
    ("reward_margin",),
    ("chosen_rewards", "rejected_rewards"),
    ("chosen_logps", "rejected_logps"),
)


def write_html(report: DemoReport, path: Path) -> None:
    """Write the report as one self-contained page: no scripts, no other files, nothing fetched."""
    write_template(path, "pivot_megatron.recipe", "report.html.j2", **_page(report))


def _page(report: DemoReport) -> dict[str, Any]:
    """The template's names. Models keep one colour throughout the page, given in order of appearance."""
    found = measures(report)
    scored = models(found)
    shown_in_examples = [model for example in report.examples for model in example.answers]
    slots = colours([*scored, *shown_in_examples])
    changes = [change for measure in found for change in comparisons(measure)]
    shown = run_panels(report.curves, slots, _PANELS)
    folded = run_panels(report.curves, slots, _others(report.curves))
    return {
        "report": report,
        "slots": slots,
        "measures": found,
        "models": scored,
        "outside": sum(change.verdict != INSIDE for change in changes),
        "changes": change_table(changes),
        "answers": answer_table(report.answers, slots),
        "preference": preference_table(report.preference, slots),
        "probes": probe_table(report.probes, slots),
        "shown": shown,
        "folded": folded,
        "folded_names": list(dict.fromkeys(name for panel in folded for name, *_ in panel.legend)),
        "total_seconds": sum(report.seconds.values()),
        "duration": _duration,
    }


def _others(curves: Mapping[str, Mapping[str, Curve]]) -> list[tuple[str]]:
    """The metrics that no panel of `_PANELS` has, each a panel of its own."""
    grouped = {name for group in _PANELS for name in group}
    return [
        (name,)
        for name in dict.fromkeys(name for metrics in curves.values() for name in metrics)
        if name not in grouped
    ]


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f}\u00a0s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}\u00a0min\u00a0{rest}\u00a0s"
    return f"{minutes // 60}\u00a0h\u00a0{minutes % 60}\u00a0min"


def terminal_table(report: DemoReport) -> str:
    """The headline numbers in percent with their 95 % intervals, each comparison's verdict, and the exports."""
    columns = measures(report)
    header = ["", *(measure.name for measure in columns)]
    rows = [[model, *(_cell(measure.estimates.get(model)) for measure in columns)] for model in models(columns)]
    lines = _aligned([header, *rows])
    changes = [
        [change.measure, f"{change.second} - {change.first}", _points(change), change.verdict]
        for measure in columns
        for change in comparisons(measure)
    ]
    lines += ["", *_aligned(changes)] if changes else []
    exports = [
        [
            f"export {export.name}",
            "loads" if export.loaded else "DOES NOT LOAD",
            f"max difference {export.max_difference:.1e}",
            f"{export.changed_tensors} tensors changed, {export.unchanged_tensors} unchanged",
        ]
        for export in report.exports
    ]
    lines += ["", *_aligned(exports)] if exports else []
    return "\n".join(lines)


def _cell(found: Estimate | None) -> str:
    if found is None:
        return "-"
    return f"{100 * found.value:.1f} [{100 * found.interval.low:.1f}, {100 * found.interval.high:.1f}]"


def _points(change: Comparison) -> str:
    low, high = 100 * change.interval.low, 100 * change.interval.high
    return f"{100 * change.change:+.1f} [{low:+.1f}, {high:+.1f}]"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
