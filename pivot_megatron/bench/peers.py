"""`pivot bench peers`: this trainer and TRL's DPOTrainer over the same model and pairs, in alternation."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pivot_megatron.bench.agreement import largest_differences
from pivot_megatron.bench.flops import Flops, PairLengths, Work, pivot_work, step, trl_work
from pivot_megatron.bench.gemm import gemm_peak
from pivot_megatron.bench.peer_environment import default_cache, peer_python
from pivot_megatron.bench.peer_job import Setting, pair_lengths
from pivot_megatron.bench.peer_runs import PeerRun, run_pivot, run_trl
from pivot_megatron.bench.shapes import Shape
from pivot_megatron.bench.world import make_world
from pivot_megatron.convert.store import describe
from pivot_megatron.errors import UserError
from pivot_megatron.model.composition import Architecture

SIDES = ("pivot", "trl")
WARM_UP = 1
"""Steps at a run's beginning that are not timed: they pay for the first use of everything."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Speed:
    """One run, the reference pass counted in. `tokens`: of both answers behind a prefix each, whoever lays them out how.
    `reference_seconds`: a pair, where it is a pass of its own. `others`: cores that other processes kept busy meanwhile."""

    side: str
    pairs_a_second: float
    tokens_a_second: float
    peak_bytes: int
    others: float
    step_seconds: tuple[float, ...]
    reference_seconds: float


@dataclass(frozen=True)
class Spread:
    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Summary:
    """Spreads are over rounds; a ratio is of the two runs of one round. `gain`: ours by theirs for speed, theirs by ours for
    memory and FLOPs: above 1 is for us."""

    pairs_a_second: Mapping[str, Spread]
    tokens_a_second: Mapping[str, Spread]
    peak_bytes: Mapping[str, Spread]
    others: Mapping[str, Spread]
    speed_gain: Spread
    memory_gain: Spread


@dataclass(frozen=True)
class Comparison:
    """`epochs` share one reference pass of ours. `gemm_peak`: FLOP/s, see there; the best over the rounds. `flops`: a mean
    step's by side, and TRL's as it would be on a GPU. `differences`: the largest between the two sides'
    metrics, see `largest_differences`."""

    shape: Shape
    setting: Setting
    epochs: int
    gemm_peak: float
    rounds: Sequence[Mapping[str, Speed]]
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
    measured: list[dict[str, Speed]] = []
    peaks: list[float] = []
    differences: dict[str, float] = {}
    for number in range(rounds):
        peaks.append(gemm_peak())
        found: dict[str, PeerRun] = {}
        speeds: dict[str, Speed] = {}
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            folder = out / "runs" / f"{number}-{side}"
            ours = side == "pivot"
            found[side] = run_pivot(world, setting, folder) if ours else run_trl(python, world, setting, folder)
            speeds[side] = speed_of(side, found[side], lengths, epochs)
            say(f"round {number + 1} of {rounds}: {side} {speeds[side].pairs_a_second:.3g} pairs/s")
        measured.append(speeds)
        one = largest_differences(found["pivot"].steps, found["trl"].steps, setting.beta)
        differences = {name: max(value, differences.get(name, 0.0)) for name, value in one.items()}
    flops = flops_by_side(describe(world.checkpoint).architecture(), lengths[WARM_UP:], epochs)
    return Comparison(shape, setting, epochs, max(peaks), measured, summarise(measured), flops, differences)


def speed_of(side: str, run: PeerRun, lengths: Sequence[Sequence[PairLengths]], epochs: int) -> Speed:
    steps = tuple(float(line["step_seconds"]) for line in run.steps[WARM_UP:])
    timed = lengths[WARM_UP:]
    pairs = sum(len(step) for step in timed)
    tokens = sum(pair.separate for step in timed for pair in step)
    seconds = sum(steps) + pairs * run.reference_seconds / epochs
    watched, reference = run.watched, run.reference_seconds
    return Speed(side, pairs / seconds, tokens / seconds, watched.peak_bytes, watched.others, steps, reference)


def summarise(rounds: Sequence[Mapping[str, Speed]]) -> Summary:
    def by_side(value: Callable[[Speed], float]) -> dict[str, Spread]:
        return {side: spread([value(one[side]) for one in rounds]) for side in SIDES}

    return Summary(
        pairs_a_second=by_side(lambda speed: speed.pairs_a_second),
        tokens_a_second=by_side(lambda speed: speed.tokens_a_second),
        peak_bytes=by_side(lambda speed: speed.peak_bytes),
        others=by_side(lambda speed: speed.others),
        speed_gain=spread([one["pivot"].pairs_a_second / one["trl"].pairs_a_second for one in rounds]),
        memory_gain=spread([one["trl"].peak_bytes / one["pivot"].peak_bytes for one in rounds]),
    )


def spread(values: Sequence[float]) -> Spread:
    return Spread(min(values), statistics.median(values), max(values))


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
