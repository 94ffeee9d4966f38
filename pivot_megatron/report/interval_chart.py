"""Estimates over a number that was chosen, such as how many samples: lines with their intervals as bars, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from pivot_megatron.report.charts import Axis, label

_WIDTH, _HEIGHT = 640, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 16, 14, 44
_APART = 5.0  # pixels between the bars of lines at the same place
_LABEL = 44.0  # pixels that the label of a place takes
_WIDE = 8.0  # largest over smallest, from which on places are drawn by their logarithm


@dataclass(frozen=True)
class IntervalLine:
    """One line: `(place, value, low, high)` in order of place, ends infinite where there is no interval. `slot`: its colour."""

    name: str
    points: Sequence[tuple[float, float, float, float]]
    slot: int


@dataclass(frozen=True)
class Titles:
    """What the chart shows, for those who hear it, and of each axis what is on it."""

    chart: str
    x: str
    y: str


def interval_chart(lines: Sequence[IntervalLine], titles: Titles, level: float | None = None) -> str:
    """Places a factor of 8 or more apart are drawn by their logarithm. `level`: a value that all are seen against, dashed."""
    places = sorted({point[0] for line in lines for point in line.points})
    logarithmic = places[0] > 0 and places[-1] >= _WIDE * places[0]
    ends = [end for line in lines for _, *ends in line.points for end in ends if math.isfinite(end)]
    y_axis = Axis.over(_roomy([*ends, *([] if level is None else [level])]), _HEIGHT - _BOTTOM, _TOP)
    room = _APART * len(lines)
    x_axis = Axis.over([_place(one, logarithmic) for one in places], _LEFT + room, _WIDTH - _RIGHT - room)
    parts = [f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(titles.chart)}">']
    parts += _scales(x_axis, y_axis, places, logarithmic, titles)
    if level is not None:
        y = y_axis.at(level)
        parts.append(f'<line class="level" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for n, line in enumerate(lines):
        aside = _APART * (n - (len(lines) - 1) / 2)
        parts += _line(line, [x_axis.at(_place(point[0], logarithmic)) + aside for point in line.points], y_axis)
    return "".join([*parts, "</svg>"])


def _place(one: float, logarithmic: bool) -> float:
    return math.log(one) if logarithmic else one


def _roomy(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return low - (high - low) / 20, high + (high - low) / 20


def _scales(x_axis: Axis, y_axis: Axis, places: Sequence[float], logarithmic: bool, titles: Titles) -> list[str]:
    parts = []
    for tick in y_axis.ticks:
        y = y_axis.at(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 3.5:.1f}" text-anchor="end">{label(tick)}</text>')
    last = -math.inf
    for one in places:
        x = x_axis.at(_place(one, logarithmic))
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
        if x - last >= _LABEL:
            parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 26}" text-anchor="middle">{one:,g}</text>')
            last = x
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    across = (_LEFT + _WIDTH - _RIGHT) / 2
    note = ", logarithmic" if logarithmic else ""
    parts.append(f'<text x="{across:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(titles.x)}{note}</text>')
    turned = f'transform="rotate(-90 14 {middle:.1f})"'
    parts.append(f'<text x="14" y="{middle:.1f}" text-anchor="middle" {turned}>{escape(titles.y)}</text>')
    return parts


def _line(line: IntervalLine, across: Sequence[float], y_axis: Axis) -> list[str]:
    style = f'style="stroke:var(--s{line.slot})"'
    heights = [y_axis.at(value) for _, value, _, _ in line.points]
    moves = "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(across, heights, strict=True))
    parts = [f'<path class="line" {style} d="M{moves}"/>']
    for x, (_, _, low, high) in zip(across, line.points, strict=True):
        if math.isfinite(low) and math.isfinite(high):
            parts.append(f'<path class="line bar-end" {style} d="{_whisker(x, y_axis.at(low), y_axis.at(high))}"/>')
    dot = f'style="fill:var(--s{line.slot})"'
    return [*parts, *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" {dot}/>' for x, y in zip(across, heights, strict=True))]


def _whisker(x: float, low: float, high: float) -> str:
    return (
        f"M{x:.1f} {low:.1f}L{x:.1f} {high:.1f}M{x - 3:.1f} {low:.1f}L{x + 3:.1f} {low:.1f}"
        f"M{x - 3:.1f} {high:.1f}L{x + 3:.1f} {high:.1f}"
    )
