"""How a run's speed grows with devices: its own batch over more of them, and a batch that grows with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pivot_megatron.config.schema import Layout
from pivot_megatron.errors import UserError
from pivot_megatron.plan.estimate import Estimate, Subject
from pivot_megatron.plan.limits import limited_by
from pivot_megatron.plan.machine import Machine
from pivot_megatron.plan.plan import plan

MOST = 1024
"""Devices up to which curves go."""


@dataclass(frozen=True)
class Point:
    """The fastest layout of so many devices; None where none fits or the model cannot be cut over them, for the reason `why`."""

    gpus: int
    best: Estimate | None
    why: str = ""


@dataclass(frozen=True)
class Scaling:
    """`strong`: the run's own global batch; `weak`: as many samples a device as on the fewest devices."""

    strong: tuple[Point, ...]
    weak: tuple[Point, ...]


def scaling(subject: Subject, own: Layout, gpus: int, machine: Machine) -> Scaling:
    """From `gpus` devices on, doubled up to `MOST`. Raises UserError where they are more than that."""
    if gpus > MOST:
        raise UserError(
            f"--scaling: curves end at {MOST:,} devices, found --gpus {gpus}; start from fewer, or leave it out"
        )
    counts = [gpus << n for n in range((MOST // gpus).bit_length())]
    strong = tuple(_point(subject, own, count, machine) for count in counts)
    grown = (_point(_grown(subject, count // gpus), own, count, machine) for count in counts[1:])
    return Scaling(strong, (strong[0], *grown))


def against_ideal(points: Sequence[Point]) -> list[float | None]:
    """Of each the samples a second, as a share of what the first that fits would come to with as many more devices."""
    first = next((point for point in points if point.best), None)
    return [
        point.best.samples_a_second / point.gpus / (first.best.samples_a_second / first.gpus)
        if point.best and first and first.best
        else None
        for point in points
    ]


def _point(subject: Subject, own: Layout, gpus: int, machine: Machine) -> Point:
    try:
        best = plan(subject, own, gpus, machine).best
    except UserError as error:  # a curve has gaps, and says why
        return Point(gpus, None, str(error))
    return Point(gpus, best) if best.fits else Point(gpus, None, limited_by(best))


def _grown(subject: Subject, times: int) -> Subject:
    return replace(subject, times=times, batch=replace(subject.batch, global_size=subject.batch.global_size * times))
