"""`pivot bench peers`: this trainer and TRL's DPOTrainer over the same model and pairs, in alternation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pivot_megatron.bench.agreement import largest_differences
from pivot_megatron.bench.flops import PairLengths, pivot_work, step, trl_work
from pivot_megatron.bench.peer_environment import default_cache, peer_python
from pivot_megatron.bench.peer_job import Setting, pair_lengths
from pivot_megatron.bench.peer_runs import PeerRun, run_pivot, run_trl
from pivot_megatron.bench.shapes import Shape
from pivot_megatron.bench.spread import QUIET, Spread, spread
from pivot_megatron.bench.world import make_world
from pivot_megatron.convert.store import describe
from pivot_megatron.errors import UserError
from pivot_megatron.model.composition import Architecture
from pivot_megatron.model.flops import Flops, Work

SIDES = ("pivot", "trl")
WARM_UP = 1
"""Steps at a run's beginning that are not timed: they pay for the first use of everything."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Summary:
    """Speeds are of the steps that were made while the machine was quiet, the reference pass counted in; `tokens` are of both
    answers behind a prefix each, whoever lays them out how. `steps`: how many those are, of how many timed.

    Spreads are over rounds; a ratio is of the two runs of one round, both with quiet steps. `gain`: ours by theirs for speed,
    theirs by ours for memory: above 1 is for us. `quiet`: whether any round has such a ratio; without one, what was timed on a
    busy machine stands here instead. `reference_seconds`: of our own reference pass, a pair.
    """

    quiet: bool
    reference_seconds: float
    steps: Mapping[str, tuple[int, int]]
    pairs_a_second: Mapping[str, Spread]
    tokens_a_second: Mapping[str, Spread]
    peak_bytes: Mapping[str, Spread]
    speed_gain: Spread
    memory_gain: Spread


@dataclass(frozen=True)
class Comparison:
    """`epochs` share one reference pass of ours. `gemm_peak`: FLOP/s, the best of all looks at the machine. `rounds`: every run
    by side. `flops`: a mean step's by side, and TRL's as it would be on a GPU. `differences`: the largest between the two
    sides' metrics, see `largest_differences`."""

    shape: Shape
    setting: Setting
    epochs: int
    gemm_peak: float
    rounds: Sequence[Mapping[str, PeerRun]]
    summary: Summary
    flops: Mapping[str, Flops]
    differences: Mapping[str, float]


def compare(
    shape: Shape, rounds: int, steps: int, epochs: int, peer_batch: int | None, out: Path, say: Say
) -> Comparison:
    """Make the world in `out`, run both sides `rounds` times.

    Raises UserError for numbers that measure nothing, and for an `out` that has files in it.
    """
    if rounds < 1 or steps <= WARM_UP:
        raise UserError(f"bench peers: expected --rounds >= 1 and --steps > {WARM_UP}, found {rounds} and {steps}")
    if epochs < 1:
        raise UserError(f"bench peers: expected --epochs >= 1, found {epochs}")
    if peer_batch is not None and (peer_batch < 1 or shape.pairs_a_step % peer_batch):
        raise UserError(f"bench peers: expected --peer-batch to divide {shape.pairs_a_step}, found {peer_batch}")
    setting = Setting(steps, shape.pairs_a_step, peer_batch=peer_batch)
    say("the peer's environment")
    python = peer_python(default_cache())
    say(f"model and pairs of shape {shape.name}")
    world = make_world(out, shape)
    lengths = pair_lengths(world, setting)
    measured: list[dict[str, PeerRun]] = []
    differences: dict[str, float] = {}
    for number in range(rounds):
        found: dict[str, PeerRun] = {}
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            folder = out / "runs" / f"{number}-{side}"
            ours = side == "pivot"
            found[side] = run_pivot(world, setting, folder) if ours else run_trl(python, world, setting, folder)
            seconds = ", ".join(f"{step.seconds:.2f}" for step in found[side].watched.steps)
            say(f"round {number + 1} of {rounds}: {side}, steps of {seconds} s")
        measured.append(found)
        one = largest_differences(found["pivot"].steps, found["trl"].steps, setting.beta)
        differences = {name: max(value, differences.get(name, 0.0)) for name, value in one.items()}
    timed = lengths[WARM_UP:]
    flops = flops_by_side(describe(world.checkpoint).architecture(), timed, epochs)
    peak = max(part.rate for found in measured for run in found.values() for part in run.watched.slices)
    summary = summarise(measured, timed, epochs, QUIET * peak)
    return Comparison(shape, setting, epochs, peak, measured, summary, flops, differences)


def summarise(
    rounds: Sequence[Mapping[str, PeerRun]], lengths: Sequence[Sequence[PairLengths]], epochs: int, floor: float
) -> Summary:
    """`lengths`: of the timed steps' pairs. `floor`: the machine's rate below which it is not quiet."""
    references = [run for run in (found["pivot"] for found in rounds) if run.watched.start.rate >= floor]
    reference = statistics.median(run.reference_seconds for run in references) if references else math.nan
    speeds = {
        side: [_speed(found[side], lengths, reference / epochs if side == "pivot" else 0.0, floor) for found in rounds]
        for side in SIDES
    }
    both = [pair for pair in zip(speeds["pivot"], speeds["trl"], strict=True) if all(speed.steps for speed in pair)]
    if floor and not (references and both):
        return replace(summarise(rounds, lengths, epochs, floor=0.0), quiet=False)

    def by_side(value: Callable[[_Speed], float]) -> dict[str, Spread]:
        return {side: spread([value(speed) for speed in speeds[side] if speed.steps]) for side in SIDES}

    memory = {side: [float(found[side].watched.peak_bytes) for found in rounds] for side in SIDES}
    return Summary(
        quiet=True,
        reference_seconds=reference,
        steps={side: (sum(s.steps for s in speeds[side]), len(rounds) * len(lengths)) for side in SIDES},
        pairs_a_second=by_side(lambda speed: speed.pairs / speed.seconds),
        tokens_a_second=by_side(lambda speed: speed.tokens / speed.seconds),
        peak_bytes={side: spread(memory[side]) for side in SIDES},
        speed_gain=spread([(a.pairs / a.seconds) / (b.pairs / b.seconds) for a, b in both]),
        memory_gain=spread([b / a for a, b in zip(memory["pivot"], memory["trl"], strict=True)]),
    )


@dataclass(frozen=True)
class _Speed:
    steps: int
    pairs: int
    tokens: int
    seconds: float


def _speed(run: PeerRun, lengths: Sequence[Sequence[PairLengths]], reference: float, floor: float) -> _Speed:
    """Of the run's quiet steps. `reference`: seconds a pair that come on top."""
    quiet = [
        (step.seconds, pairs) for step, pairs in zip(run.watched.steps, lengths, strict=True) if step.rate >= floor
    ]
    pairs = [pair for _, step in quiet for pair in step]
    seconds = sum(seconds for seconds, _ in quiet) + reference * len(pairs)
    return _Speed(len(quiet), len(pairs), sum(pair.separate for pair in pairs), seconds)


def flops_by_side(arch: Architecture, steps: Sequence[Sequence[PairLengths]], epochs: int) -> dict[str, Flops]:
    """Of the mean step, ours with its share of a reference pass."""
    work_of: dict[str, Callable[[Sequence[PairLengths]], Work]] = {
        "pivot": pivot_work,
        "trl": partial(trl_work, on_gpu=False),
        "trl_on_gpu": partial(trl_work, on_gpu=True),
    }
    return {
        side: sum((step(arch, work(pairs), epochs if side == "pivot" else 1) for pairs in steps), Flops()).scaled(
            1 / len(steps)
        )
        for side, work in work_of.items()
    }
