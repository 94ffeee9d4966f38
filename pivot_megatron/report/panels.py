"""Charts with their legends: the curves of runs, and whatever else a section shows beside one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from pivot_megatron.report.charts import Series, line_chart

# The style sheet has six colours for models, two for the branches of a pair, and one for runs that are no model.
MODEL_COLOURS = 6
_BRANCH_COLOURS = {"chosen": 6, "rejected": 7}
_OTHER_COLOUR = 8

Curve = Sequence[tuple[int, float]]
"""A metric over a run: `(step, value)` in order of step."""


@dataclass(frozen=True)
class Panel:
    """A chart of a run, and for each of its lines the name, the colour slot, the first and the last value."""

    run: str
    svg: Markup
    legend: Sequence[tuple[str, int, str, str]]


def colours(names: Sequence[str]) -> dict[str, int]:
    """A slot each, in order of appearance."""
    return {name: i % MODEL_COLOURS for i, name in enumerate(dict.fromkeys(names))}


def run_panels(
    curves: Mapping[str, Mapping[str, Curve]], slots: Mapping[str, int], groups: Sequence[Sequence[str]]
) -> list[Panel]:
    """A panel for each of `groups`, metrics that share one, of each run that has any of them. A run named in `slots` has that
    colour."""
    found = []
    for run, metrics in curves.items():
        shared = [[name for name in group if name in metrics] for group in groups]
        found += [_panel(run, metrics, group, slots.get(run, _OTHER_COLOUR)) for group in shared if group]
    return found


def _panel(run: str, metrics: Mapping[str, Curve], names: Sequence[str], slot: int) -> Panel:
    slots = [_BRANCH_COLOURS.get(name.split("_")[0], slot) for name in names]
    lines = [Series(name, metrics[name], colour) for name, colour in zip(names, slots, strict=True)]
    svg = line_chart(lines, title=f"{run}: {', '.join(names)}")
    # The chart escapes what it takes from the run.
    return Panel(run, Markup(svg), [(line.name, line.slot, *_ends(line.points)) for line in lines])


def _ends(points: Curve) -> tuple[str, str]:
    if not points:
        return "none", "none"
    return f"{points[0][1]:.4g}", f"{points[-1][1]:.4g}"
