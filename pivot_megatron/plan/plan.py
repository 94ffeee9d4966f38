"""Every layout of a run on a number of devices, the fastest that fits first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from pivot_megatron.config.schema import Layout, Recompute
from pivot_megatron.errors import UserError
from pivot_megatron.plan.candidates import layouts
from pivot_megatron.plan.estimate import Estimate, Subject, estimate
from pivot_megatron.plan.machine import Machine

MODES = ("none", "selective", "full")
"""Of recomputing activations, encoder and language model alike."""


@dataclass(frozen=True)
class Choice:
    """A layout by the fastest mode of recomputing and size of micro-batch with which it fits, or, where it fits with none, the
    one that takes the least memory. `by_mode`: its estimate with each mode and the run's own micro-batches."""

    best: Estimate
    by_mode: dict[str, Estimate]


@dataclass(frozen=True)
class Plan:
    """`choices`: those that fit by speed, then the others by memory."""

    machine: Machine
    gpus: int
    choices: tuple[Choice, ...]

    @property
    def fitting(self) -> tuple[Choice, ...]:
        return tuple(choice for choice in self.choices if choice.best.fits)


def plan(subject: Subject, own: Layout, gpus: int, machine: Machine) -> Plan:
    """`own`: the run's layout, what of it is not planned (overlaps) stays. Raises UserError where the model cannot be cut over so
    many devices."""
    samples = subject.batch.global_size
    found = list(layouts(subject.arch, subject.precision, own, gpus, machine.devices_a_node, samples))
    if not found:
        raise UserError(
            f"--gpus: no layout cuts this model over {gpus} devices with a global batch of {samples}; try a power of two, or "
            "raise batch.global_size"
        )
    choices = [_choice(subject, layout, gpus, machine) for layout in found]
    return Plan(machine, gpus, tuple(sorted(choices, key=_rank)))


def plan_one(subject: Subject, layout: Layout, gpus: int, machine: Machine) -> Plan:
    """Of one layout alone."""
    return Plan(machine, gpus, (_choice(subject, layout, gpus, machine),))


def _rank(choice: Choice) -> tuple[bool, float]:
    best = choice.best
    return (not best.fits, best.step_seconds if best.fits else best.peak_bytes)


def _choice(subject: Subject, layout: Layout, gpus: int, machine: Machine) -> Choice:
    by_mode = {mode: estimate(_with(subject, mode, 1.0), layout, gpus, machine) for mode in MODES}
    others = [estimate(_with(subject, mode, factor), layout, gpus, machine) for mode in MODES for factor in (0.5, 2.0)]
    return Choice(_best([*by_mode.values(), *others]), by_mode)


def _best(estimates: Iterable[Estimate]) -> Estimate:
    return min(estimates, key=lambda e: (not e.fits, e.step_seconds if e.fits else e.peak_bytes))


def _with(subject: Subject, mode: str, factor: float) -> Subject:
    micro = max(1, int(subject.batch.micro_tokens * factor))
    recompute = Recompute(encoder=mode, llm=mode)  # type: ignore[arg-type]
    return replace(subject, recompute=recompute, batch=replace(subject.batch, micro_tokens=micro))
