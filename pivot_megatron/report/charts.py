"""Line charts as inline SVG, coloured by the page's own style sheet so that they follow its light and dark themes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

_WIDTH, _HEIGHT = 360, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 26
_SMOOTH_FROM = 40
_MOST = 2000  # points of a line, more than which are no more to be seen


@dataclass(frozen=True)
class Series:
    """One line: `(step, value)` points in order of step. `slot` picks the style sheet's colour `--s{slot}`."""

    name: str
    points: Sequence[tuple[int, float]]
    slot: int


def line_chart(series: Sequence[Series], *, title: str) -> str:
    """An SVG of the series over the training step, with its own axes.

    A line of 40 points or more is drawn faint, with its centred moving mean (over a tenth of the line) on top; of more than
    2000, evenly chosen ones are drawn. A value that is not finite breaks the line; without any that is, the string is empty.
    """
    series = [replace(line, points=_evenly(line.points)) for line in series]
    finite = [point for line in series for point in line.points if math.isfinite(point[1])]
    if not finite:
        return ""
    x_axis = Axis.over([step for step, _ in finite], _LEFT, _WIDTH - _RIGHT)
    y_axis = Axis.over([value for _, value in finite], _HEIGHT - _BOTTOM, _TOP)
    parts = [f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in y_axis.ticks:
        y = y_axis.at(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{label(tick)}</text>')
    for tick in x_axis.ticks:
        parts.append(f'<text x="{x_axis.at(tick):.1f}" y="{_HEIGHT - 9}" text-anchor="middle">{label(tick)}</text>')
    for line in series:
        smooth = _moving_mean(line.points) if len(line.points) >= _SMOOTH_FROM else None
        parts.append(_path(line.points, line.slot, x_axis, y_axis, faint=smooth is not None))
        if smooth is not None:
            parts.append(_path(smooth, line.slot, x_axis, y_axis, faint=False))
    return "".join([*parts, "</svg>"])


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most + 1` round numbers (steps of 1, 2 or 5 times a power of ten) within `[low, high]`."""
    if high <= low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


@dataclass(frozen=True)
class Axis:
    """A linear scale from the values `low..high` to the pixels `start..end`."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float) -> "Axis":
        low, high = min(values), max(values)
        # A constant line gets some room, and lands in the middle.
        pad = 0.0 if high > low else abs(low) / 10 or 1.0
        return cls(low - pad, high + pad, start, end)

    @property
    def ticks(self) -> list[float]:
        return nice_ticks(self.low, self.high)

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _path(points: Sequence[tuple[float, float]], slot: int, x_axis: Axis, y_axis: Axis, *, faint: bool) -> str:
    moves, pen = [], "M"
    for step, value in points:
        if math.isfinite(value):
            moves.append(f"{pen}{x_axis.at(step):.1f} {y_axis.at(value):.1f}")
            pen = "L"
        else:
            pen = "M"
    kind = "line faint" if faint else "line"
    return f'<path class="{kind}" style="stroke:var(--s{slot})" d="{"".join(moves)}"/>'


def _evenly(points: Sequence[tuple[int, float]]) -> Sequence[tuple[int, float]]:
    """The first and the last among them."""
    if len(points) <= _MOST:
        return points
    return [points[round(n * (len(points) - 1) / (_MOST - 1))] for n in range(_MOST)]


def _moving_mean(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """The mean of the finite values within a twentieth of the line's length on either side; one-sided at the ends."""
    reach = max(1, len(points) // 20)
    means: list[tuple[float, float]] = []
    for index, (step, value) in enumerate(points):
        window = [near for _, near in points[max(0, index - reach) : index + reach + 1] if math.isfinite(near)]
        means.append((step, sum(window) / len(window) if window and math.isfinite(value) else math.nan))
    return means


def label(value: float) -> str:
    """A tick's, short."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}".replace("-", "\u2212")
