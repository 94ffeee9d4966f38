"""Every layout of a run on a number of devices, the fastest that fits first."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pivot_megatron.config.schema import Layout, Recompute
from pivot_megatron.errors import UserError
from pivot_megatron.model.fit import require_fit
from pivot_megatron.plan.candidates import layouts
from pivot_megatron.plan.estimate import Estimate, Subject, estimate
from pivot_megatron.plan.machine import Machine, require_rates

MODES = ("none", "selective", "full")
"""Of recomputing activations, encoder and language model alike; each keeps less than the one before, and takes longer."""
SHARES = (0.5, 1.0, 2.0)
"""Of the run's own micro-batches, in tokens."""


@dataclass(frozen=True)
class Plan:
    """`estimates`: those that fit by speed, then the others by memory; of each layout the fastest mode of recomputing and size of
    micro-batch with which it fits, or, where it fits with none, the one that takes the least memory."""

    machine: Machine
    gpus: int
    estimates: tuple[Estimate, ...]

    @property
    def best(self) -> Estimate:
        return self.estimates[0]

    @property
    def fitting(self) -> tuple[Estimate, ...]:
        return tuple(found for found in self.estimates if found.fits)


def plan(subject: Subject, own: Layout, gpus: int, machine: Machine) -> Plan:
    """`own`: the run's layout, of which what is not planned stays. Raises UserError where the model cannot be cut over so many
    devices, or the machine does not compute in the run's precision."""
    require_rates(machine, subject.precision)
    samples = subject.batch.global_size
    found = list(layouts(subject.arch, subject.precision, own, gpus, machine.devices_a_node, samples))
    if not found:
        raise UserError(
            f"--gpus: expected a number of devices that some layout cuts this model over, with a global batch of {samples}, "
            f"found {gpus}; try a power of two, or raise batch.global_size"
        )
    return Plan(machine, gpus, tuple(sorted((_fastest(subject, layout, gpus, machine) for layout in found), key=_rank)))


def plan_one(subject: Subject, layout: Layout, gpus: int, machine: Machine) -> Plan:
    """Of one layout alone, with the run's own mode of recomputing and micro-batches. Raises UserError where the model cannot be
    cut so, or the devices do not divide."""
    require_rates(machine, subject.precision)
    require_fit(subject.arch, layout, subject.precision)
    if gpus % layout.model_parallel_size:
        raise UserError(
            f"--gpus: tensor {layout.tensor} x pipeline {layout.pipeline} needs a multiple of {layout.model_parallel_size}, "
            f"found {gpus}"
        )
    return Plan(machine, gpus, (estimate(subject, layout, gpus, machine),))


def recomputing(found: Estimate) -> dict[str, Estimate]:
    """The same with each of `MODES`."""
    return {mode: estimate(_with(found.subject, mode, 1.0), found.layout, found.gpus, found.machine) for mode in MODES}


def _rank(found: Estimate) -> tuple[bool, float]:
    return (not found.fits, found.step_seconds if found.fits else found.peak_bytes)


def _fastest(subject: Subject, layout: Layout, gpus: int, machine: Machine) -> Estimate:
    tried: list[Estimate] = []
    for share in SHARES:
        for mode in MODES:
            tried.append(estimate(_with(subject, mode, share), layout, gpus, machine))
            if tried[-1].fits:  # what keeps less is slower
                break
    return min(tried, key=_rank)


def _with(subject: Subject, mode: str, share: float) -> Subject:
    micro = max(1, int(subject.batch.micro_tokens * share))
    recompute = Recompute(encoder=mode, llm=mode)  # type: ignore[arg-type]
    return replace(subject, recompute=recompute, batch=replace(subject.batch, micro_tokens=micro))
