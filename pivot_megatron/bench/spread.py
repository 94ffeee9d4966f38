"""What differs from round to round."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

QUIET = 0.8
"""Of the machine's best rate at matrix products: what was timed while it fell lower is left out."""


@dataclass(frozen=True)
class Spread:
    low: float
    median: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    return Spread(min(values), statistics.median(values), max(values))
