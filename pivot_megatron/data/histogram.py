"""Values in bins with round edges: the same numbers for a terminal, a page and a script."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low

ASPECT_RATIOS = (
    0,
    0.1,
    0.2,
    0.3,
    0.5,
    0.7,
    0.9,
    1.1,
    1.4,
    2,
    3,
    5,
    *(digit * 10**power for power in range(1, 10) for digit in (1, 2, 5)),
)
"""Bins of width / height: nearly square in one of them, 4:3 in the next, 3:2 and 16:9 in the one after, upright likewise."""

_BINS = 10
_FAR_APART = 20
"""From a largest value this many times the smallest on, bins grow with their values: lengths have long tails."""
_FINE = 100
"""Up to this many times the smallest, they grow in smaller steps."""


@dataclass(frozen=True)
class Measure:
    """What was measured of one field. `counts[i]` values lie in `edges[i] <= value < edges[i + 1]`.

    Fields measured together have the same edges. `median` is a value that occurs, the lower of two.
    """

    name: str
    unit: str
    least: float
    median: float
    most: float
    edges: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """Of the bins: from 10 to 19 between whole numbers; elsewhere from 0.5 to 0.7, the second number left out."""
        whole = all(isinstance(edge, int) for edge in self.edges)
        return tuple(
            edge_label(low) if whole and high == low + 1 else f"{edge_label(low)}\u2013{edge_label(high - whole)}"
            for low, high in zip(self.edges, self.edges[1:], strict=False)
        )


def measures(
    unit: str, values: Mapping[str, Sequence[float]], rounds: Sequence[float] | None = None
) -> Sequence[Measure]:
    """One for each name that has values, in bins that all of them share.

    `rounds`: what edges are taken from, in order and beyond all values; left out, values are whole numbers of at least 0.
    """
    held = {name: found for name, found in values.items() if found}
    if not held:
        return []
    low, high = min(map(min, held.values())), max(map(max, held.values()))
    edges = _within(_round_numbers(int(low), int(high)) if rounds is None else rounds, low, high)
    return [_measure(name, unit, found, edges) for name, found in held.items()]


def edge_label(edge: float) -> str:
    return f"{edge:,}" if isinstance(edge, int) else f"{edge:,g}"


def value_label(value: float) -> str:
    """`1,234`, or `0.75` for a value that is no whole number by nature."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def _measure(name: str, unit: str, values: Sequence[float], edges: tuple[float, ...]) -> Measure:
    counts = [0] * (len(edges) - 1)
    for value in values:
        counts[bisect_right(edges, value) - 1] += 1
    return Measure(name, unit, min(values), median_low(values), max(values), edges, tuple(counts))


def _within(rounds: Sequence[float], low: float, high: float) -> tuple[float, ...]:
    """From the last one that is at most `low` to the first above `high`."""
    return tuple(rounds[bisect_right(rounds, low) - 1 : bisect_right(rounds, high) + 1])


def _round_numbers(low: int, high: int) -> Sequence[int]:
    """Edges from `low` or less to more than `high`.

    About ten steps of 1, 2 or 5 times a power of ten; where the values lie far apart, numbers that begin with 1, 2 or 5.
    """
    if high < _FAR_APART * max(low, 1):
        step = _round_step((high - low) / _BINS)
        return range(low // step * step, high + step + 1, step)
    first = (1, 2, 5) if high > _FINE * max(low, 1) else (1, 2, 3, 5, 7)
    return [0, *(digit * 10**power for power in range(len(str(high)) + 1) for digit in first)]


def _round_step(least: float) -> int:
    power: int = 10 ** max(0, math.ceil(math.log10(max(least, 1))) - 1)
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= least)
