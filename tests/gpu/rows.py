"""What a part of the GPU check found, one line a fact."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """`found` in words or as a number; `limit` is the most it may be. `passed` is None where there is nothing to pass."""

    name: str
    found: str | float
    limit: float | None = None
    passed: bool | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class CannotRun(Exception):
    """What a part needs and this machine lacks. What it found until then counts."""


def told(name: str, found: str | float) -> Row:
    """A figure that no limit is set for."""
    return Row(name, found)


def held(name: str, found: float, limit: float) -> Row:
    """A NaN is past every limit."""
    return Row(name, found, limit, found <= limit)
