"""How a run's speed grows with devices: its own batch over more of them, and a batch that grows with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pivot_megatron.config.schema import Layout
from pivot_megatron.errors import UserError
from pivot_megatron.plan.estimate import Estimate, Subject
from pivot_megatron.plan.machine import Machine
from pivot_megatron.plan.plan import plan

MOST = 1024
"""Devices up to which curves go."""


@dataclass(frozen=True)
class Point:
    """The fastest layout of so many devices; None where none fits, or the model cannot be cut over them."""

    gpus: int
    best: Estimate | None


@dataclass(frozen=True)
class Scaling:
    """`strong`: the run's own global batch; `weak`: as many samples a device as on the fewest devices."""

    strong: tuple[Point, ...]
    weak: tuple[Point, ...]


def scaling(subject: Subject, own: Layout, gpus: int, machine: Machine) -> Scaling:
    """From `gpus` devices on, doubled up to `MOST`."""
    counts = [gpus << n for n in range(max(1, (MOST // gpus).bit_length()))]
    strong = tuple(Point(count, _best(subject, own, count, machine)) for count in counts)
    grown = (Point(count, _best(_grown(subject, count // gpus), own, count, machine)) for count in counts[1:])
    return Scaling(strong, (strong[0], *grown))


def against_ideal(points: Sequence[Point]) -> list[float | None]:
    """Of each the pairs a second, as a share of what the first that fits would come to with as many more devices."""
    first = next((point for point in points if point.best), None)
    return [
        point.best.pairs_a_second / point.gpus / (first.best.pairs_a_second / first.gpus)
        if point.best and first and first.best
        else None
        for point in points
    ]


def _best(subject: Subject, own: Layout, gpus: int, machine: Machine) -> Estimate | None:
    try:
        best = plan(subject, own, gpus, machine).best
    except UserError:  # no layout cuts it so; what else could be wrong was found at the fewest devices
        return None
    return best if best.fits else None


def _grown(subject: Subject, times: int) -> Subject:
    return replace(subject, times=times, batch=replace(subject.batch, global_size=subject.batch.global_size * times))
