"""A demo's report in its two readable forms: one self-contained page, and a short table for the terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from pivot_megatron.recipe.charts import Series, line_chart
from pivot_megatron.recipe.findings import INSIDE, Comparison, Estimate, comparisons, measures, models
from pivot_megatron.recipe.record import (
    AnswerScore,
    Curve,
    DemoReport,
    Example,
    ExportCheck,
    PreferenceScore,
    ProbeScore,
)
from pivot_megatron.recipe.tables import answer_table, change_table, preference_table, probe_table

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
# The style sheet has six colours for models, two for the branches of a pair, and one for runs that are no model.
_MODEL_COLOURS = 6
_BRANCH_COLOURS = {"chosen": 6, "rejected": 7}
_OTHER_COLOUR = 8


def write_html(report: DemoReport, path: Path) -> None:
    """Write the report as one self-contained page: no scripts, no other files, nothing fetched."""
    source = files("pivot_megatron.recipe").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(source).render(_page(report))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


@dataclass(frozen=True)
class Panel:
    """A chart of a run, and for each of its lines the name, the colour slot, the first and the last value."""

    run: str
    svg: Markup
    legend: Sequence[tuple[str, int, str, str]]


def _page(report: DemoReport) -> dict[str, Any]:
    """The template's names. Models keep one colour throughout the page, given in order of appearance."""
    found = measures(report)
    scored = models(found)
    shown_in_examples = [model for example in report.examples for model in example.answers]
    slots = {name: i % _MODEL_COLOURS for i, name in enumerate(dict.fromkeys([*scored, *shown_in_examples]))}
    changes = [change for measure in found for change in comparisons(measure)]
    shown, folded = _panels(report.curves, slots)
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


def _panels(curves: Mapping[str, Mapping[str, Curve]], slots: Mapping[str, int]) -> tuple[list[Panel], list[Panel]]:
    """The charts of all runs: those to show, and those behind a fold. A run named like a model has its colour."""
    grouped = {name for group in _PANELS for name in group}
    shown, folded = [], []
    for run, metrics in curves.items():
        groups = [[name for name in group if name in metrics] for group in _PANELS]
        shown += [_panel(run, metrics, group, slots.get(run, _OTHER_COLOUR)) for group in groups if group]
        folded += [
            _panel(run, metrics, [name], slots.get(run, _OTHER_COLOUR)) for name in metrics if name not in grouped
        ]
    return shown, folded


def _panel(run: str, metrics: Mapping[str, Curve], names: Sequence[str], slot: int) -> Panel:
    slots = [_BRANCH_COLOURS.get(name.split("_")[0], slot) for name in names]
    lines = [Series(name, metrics[name], colour) for name, colour in zip(names, slots, strict=True)]
    svg = line_chart(lines, title=f"{run}: {', '.join(names)}")
    # The chart escapes what it takes from the report.
    return Panel(run, Markup(svg), [(line.name, line.slot, *_ends(line.points)) for line in lines])


def _ends(points: Curve) -> tuple[str, str]:
    if not points:
        return "none", "none"
    return f"{points[0][1]:.4g}", f"{points[-1][1]:.4g}"


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
