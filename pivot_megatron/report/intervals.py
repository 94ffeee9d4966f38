"""Tables of estimates whose rows are drawn as an interval on one scale: what a paper calls a forest plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pivot_megatron.report.charts import nice_ticks

INSIDE = "inside the noise"
UNKNOWN = "no interval"


@dataclass(frozen=True)
class Scale:
    """The axis of a table's interval column, in percent of samples; `at` is in percent of the column's width."""

    low: float
    high: float

    @property
    def ticks(self) -> list[float]:
        return nice_ticks(self.low, self.high, most=4)

    def at(self, value: float) -> float:
        return 100 * (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Row:
    """One estimate. `value`, `low` and `high` are in percent, the last two without end where it was measured once alone; `slot`
    is its colour; `cells` fill further columns."""

    group: str
    label: str
    slot: int
    value: float
    low: float
    high: float
    cells: Sequence[str] = ()

    @property
    def finite(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)


@dataclass(frozen=True)
class Line:
    """A value, in percent, that every row of a group is seen against."""

    label: str
    value: float


@dataclass(frozen=True)
class IntervalTable:
    """Rows and the scale they share; rows of a group stand together. `heads` are the titles of the rows' `cells`. `lines`: by
    group."""

    rows: Sequence[Row]
    scale: Scale
    heads: Sequence[str]
    lines: dict[str, Line]

    def spans(self) -> list[tuple[Row, int]]:
        """Every row, with the number of rows its group's cell covers: 0 where that cell stands in a row above."""
        spans = [0] * len(self.rows)
        start = 0
        for index, row in enumerate(self.rows):
            if row.group != self.rows[start].group:
                start = index
            spans[start] += 1
        return list(zip(self.rows, spans, strict=True))


def interval_table(
    rows: Sequence[Row],
    heads: Sequence[str],
    *,
    zero: bool = False,
    lines: dict[str, Line] | None = None,
) -> IntervalTable:
    """The scale reaches from one multiple of a step to another, around every interval, line and, where asked for, zero; the step
    is the round number that cuts what there is to see into four or fewer."""
    lines = lines or {}
    ends = [end for row in rows for end in ((row.low, row.high) if row.finite else (row.value,))]
    ends += [line.value for line in lines.values()] + [0.0] * zero
    low, high = min(ends, default=0.0), max(ends, default=100.0)
    ticks = nice_ticks(low, high, most=4)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else max(high - low, 1.0)
    scale = Scale(step * math.floor(low / step), step * math.ceil(high / step))
    if scale.low == scale.high:
        scale = Scale(scale.low - step, scale.high + step)
    return IntervalTable(rows, scale, heads, lines)


def verdict(change: float, low: float, high: float) -> str:
    """Of a difference and its interval: `higher`, `lower`, INSIDE where the interval holds zero, UNKNOWN without one."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return UNKNOWN
    if low <= 0.0 <= high:
        return INSIDE
    return "higher" if change > 0 else "lower"


def change_row(group: str, label: str, change: float, low: float, high: float) -> Row:
    """A difference of two shares, in points, with its verdict in its one cell."""
    return Row(group, label, 0, 100 * change, 100 * low, 100 * high, [verdict(change, low, high)])


def verdicts_told(rows: Sequence[Row], against: str) -> str:
    """A sentence on rows of `change_row`, differences from `against`; empty of none."""
    told = [row.cells[0] for row in rows]
    if not told:
        return ""
    if len(told) == 1:
        return f"{rows[0].label} against {against}: {_points(rows[0])}."
    outside = len(told) - told.count(INSIDE) - told.count(UNKNOWN)
    of = f"{len(told)} differences from {against}"
    if outside == 0:
        return f"None of the {of} lies outside the noise: on these samples they cannot be told apart."
    if outside == len(told):
        return f"Each of the {of} lies outside the noise."
    return f"{outside} of the {of} {'lies' if outside == 1 else 'lie'} outside the noise."


def _points(row: Row) -> str:
    told = f"{row.value:+.2f} points".replace("-", "\u2212")
    if not row.finite:
        return f"{told}, a single value without an interval"
    interval = f"{row.low:+.2f} to {row.high:+.2f}".replace("-", "\u2212")
    return f"{told} (95 % interval {interval}), {row.cells[0]}{'' if row.cells[0] == INSIDE else ' by more than the noise'}"
