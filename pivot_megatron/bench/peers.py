"""`pivot bench peers`: this trainer and TRL's DPOTrainer over the same model and pairs, in alternation."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

from pivot_megatron.bench.contenders import Contender, contenders, setting_for
from pivot_megatron.bench.flops import PairLengths, pivot_work, step, trl_work
from pivot_megatron.bench.peer_environment import default_cache, peer_python
from pivot_megatron.bench.peer_job import pair_lengths
from pivot_megatron.bench.peer_runs import PeerRun, run_pivot, run_trl
from pivot_megatron.bench.peer_summary import Measured, Result, Versus, agreement, results, versus
from pivot_megatron.bench.shapes import Shape
from pivot_megatron.bench.spread import QUIET
from pivot_megatron.bench.world import World, make_world, require_empty
from pivot_megatron.convert.store import describe
from pivot_megatron.errors import UserError
from pivot_megatron.model.composition import Architecture
from pivot_megatron.model.flops import Flops, Work
from pivot_megatron.runtime.device import available_cores, device_count, use_threads

WARM_UP = 1
"""Steps at a run's beginning that are not timed: they pay for the first use of everything."""
ON_A_GPU = " on a GPU"
"""Behind the name of a contender whose operations are counted for a machine that is not this one."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    """`settings`: names of contenders, see `contenders`. `epochs` share one reference pass of ours. `trl_environment`: variables
    that TRL's processes alone are given."""

    shape: Shape
    settings: Sequence[str]
    rounds: int
    steps: int
    epochs: int
    trl_environment: Mapping[str, str]
    out: Path


@dataclass(frozen=True)
class Comparison:
    """`gemm_peak`: FLOP/s, the best of all looks at the machine. `rounds`: every run by contender, and `results` what they come
    to. `flops`: what each spends on a mean step, and TRL's as it would be on a GPU where this is none; `needed_flops`: what the
    step needs, as metrics.jsonl counts it. `differences`: the largest between the two sides' metrics, see
    `largest_differences`."""

    wanted: Wanted
    contenders: Mapping[str, Contender]
    gemm_peak: float
    rounds: Sequence[Mapping[str, PeerRun]]
    results: Mapping[str, Result]
    versus: Sequence[Versus]
    flops: Mapping[str, Flops]
    needed_flops: float
    differences: Mapping[str, float]


def compare(wanted: Wanted, say: Say) -> Comparison:
    """Make the world in `wanted.out`, run every contender as many times as there are rounds.

    Raises UserError for numbers that measure nothing, and for an `out` that has files in it.
    """
    rounds, steps, epochs = wanted.rounds, wanted.steps, wanted.epochs
    if rounds < 1 or steps <= WARM_UP:
        raise UserError(f"bench peers: expected --rounds >= 1 and --steps > {WARM_UP}, found {rounds} and {steps}")
    if epochs < 1:
        raise UserError(f"bench peers: expected --epochs >= 1, found {epochs}")
    require_empty(wanted.out)
    gpus, flash_attention = device_count(), importlib.util.find_spec("flash_attn") is not None
    setting = setting_for(wanted.shape, steps, available_cores(), gpus, flash_attention)
    found = contenders(wanted.settings, setting)
    say("the peer's environment")
    python = peer_python(default_cache())
    say(f"model and pairs of shape {wanted.shape.name}")
    world = make_world(wanted.out, wanted.shape)
    lengths = pair_lengths(world, setting)[WARM_UP:]
    arch = describe(world.checkpoint).architecture()
    use_threads(setting.threads)  # of the matrix products that the runs are held against
    runs = _runs(wanted, list(found.values()), world, python, say)
    peak = max(part.rate for by_name in runs for run in by_name.values() for part in run.watched.slices)
    measured = Measured(runs, lengths, epochs, QUIET * peak)
    made = results(measured)
    return Comparison(
        wanted=wanted,
        contenders=found,
        gemm_peak=peak,
        rounds=runs,
        results=made,
        versus=versus(measured, found, made),
        flops=flops_by_contender(arch, lengths, found.values(), epochs, on_gpu=gpus > 0),
        needed_flops=_needed(runs, found),
        differences=agreement(measured, found),
    )


def _runs(
    wanted: Wanted, ordered: Sequence[Contender], world: World, python: Path, say: Say
) -> list[dict[str, PeerRun]]:
    """To and fro, so that no contender always runs before another."""
    made: list[dict[str, PeerRun]] = []
    for number in range(wanted.rounds):
        found: dict[str, PeerRun] = {}
        for one in ordered if number % 2 == 0 else ordered[::-1]:
            folder = wanted.out / "runs" / f"{number}-{one.name.replace(':', '-')}"
            if one.side == "pivot":
                found[one.name] = run_pivot(world, one.setting, folder)
            else:
                found[one.name] = run_trl(python, world, one.setting, folder, wanted.trl_environment)
            seconds = ", ".join(f"{step.seconds:.2f}" for step in found[one.name].watched.steps)
            say(f"round {number + 1} of {wanted.rounds}: {one.name}, steps of {seconds} s")
        made.append(found)
    return made


def _needed(runs: Sequence[Mapping[str, PeerRun]], found: Mapping[str, Contender]) -> float:
    ours = next(name for name, one in found.items() if one.side == "pivot")
    return fmean(line["flops"] for line in runs[0][ours].steps[WARM_UP:])


def flops_by_contender(
    arch: Architecture,
    steps: Sequence[Sequence[PairLengths]],
    found: Iterable[Contender],
    epochs: int,
    on_gpu: bool,
) -> dict[str, Flops]:
    """Of the mean step, ours with its share of a reference pass. Micro-batches are counted as if pairs filled them in order."""
    made: dict[str, Flops] = {}
    elsewhere: dict[str, Flops] = {}
    for one in found:
        mean = partial(_mean_step, arch, steps, one.setting.micro_batch)
        if one.side == "pivot":
            made[one.name] = mean(pivot_work, epochs)
            continue
        made[one.name] = mean(partial(trl_work, on_gpu=on_gpu), 1)
        if not on_gpu:
            elsewhere[one.name + ON_A_GPU] = mean(partial(trl_work, on_gpu=True), 1)
    return made | elsewhere


def _mean_step(
    arch: Architecture,
    steps: Sequence[Sequence[PairLengths]],
    micro_batch: int,
    work: Callable[[Sequence[PairLengths]], Work],
    epochs: int,
) -> Flops:
    batches = [pairs[at : at + micro_batch] for pairs in steps for at in range(0, len(pairs), micro_batch)]
    return sum((step(arch, work(batch), epochs) for batch in batches), Flops()).scaled(1 / len(steps))
