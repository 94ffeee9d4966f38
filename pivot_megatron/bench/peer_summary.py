"""What rounds of runs come to: speed and memory of each contender, and one side's against the other's. Pure: numbers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from pivot_megatron.bench.agreement import largest_differences
from pivot_megatron.bench.contenders import SIDES, Contender, Side
from pivot_megatron.bench.flops import PairLengths
from pivot_megatron.bench.peer_runs import PeerRun
from pivot_megatron.bench.spread import Spread, spread


@dataclass(frozen=True)
class Measured:
    """`rounds`: every run, by contender's name. `lengths`: of the timed steps' pairs. `epochs` share one reference pass of ours.
    `floor`: the machine's rate, FLOP/s, below which it is not quiet."""

    rounds: Sequence[Mapping[str, PeerRun]]
    lengths: Sequence[Sequence[PairLengths]]
    epochs: int
    floor: float

    def runs(self, name: str) -> list[PeerRun]:
        return [found[name] for found in self.rounds]


@dataclass(frozen=True)
class Result:
    """Of one contender, over rounds. Speeds are of the steps that were made while the machine was quiet, or where none was
    (`quiet` false) of all; the reference pass is counted in. `tokens` are of both answers behind a prefix each, whoever lays them
    out how. `steps`: how many those are, of how many timed. `reference_seconds`: a pair, where a pass of its own takes them.
    """

    quiet: bool
    steps: tuple[int, int]
    reference_seconds: float
    pairs_a_second: Spread
    tokens_a_second: Spread
    peak_bytes: Spread


@dataclass(frozen=True)
class Ratio:
    """Ours over theirs, of the runs of one round, over the rounds in which both had quiet steps; over all, of all steps, where
    there is no such round (`quiet` false)."""

    ours: str
    theirs: str
    value: Spread
    quiet: bool


@dataclass(frozen=True)
class Versus:
    """`speed` above 1 and `memory` below 1 are for us."""

    title: str
    speed: Ratio
    memory: Ratio


def results(measured: Measured) -> dict[str, Result]:
    """By contender."""
    return {name: _result(measured, name) for name in measured.rounds[0]}


def versus(measured: Measured, contenders: Mapping[str, Contender], found: Mapping[str, Result]) -> list[Versus]:
    """Each side at its best, for speed and for memory, whichever contender that is; then like against like."""

    def best(side: Side, cost: Callable[[Result], float]) -> str:
        return min((name for name, one in contenders.items() if one.side == side), key=lambda name: cost(found[name]))

    def memory(ours: str, theirs: str) -> Ratio:
        peaks = [runs[ours].peak_bytes / runs[theirs].peak_bytes for runs in measured.rounds]
        return Ratio(ours, theirs, spread(peaks), quiet=True)

    fastest = [best(side, lambda one: -one.pairs_a_second.median) for side in SIDES]
    smallest = [best(side, lambda one: one.peak_bytes.median) for side in SIDES]
    made = [Versus("each at its best", _speed_ratio(measured, *fastest), memory(*smallest))]
    for pairs in sorted({one.setting.micro_batch for one in contenders.values()}):
        names = [f"{side}:{pairs}" for side in SIDES]
        if all(name in contenders for name in names):
            made.append(
                Versus(
                    "1 pair a pass" if pairs == 1 else f"{pairs} pairs a pass",
                    _speed_ratio(measured, *names),
                    memory(*names),
                )
            )
    return made


def agreement(measured: Measured, contenders: Mapping[str, Contender]) -> dict[str, float]:
    """The largest differences of any of ours from any of theirs in any round, see `largest_differences`."""
    ours, theirs = ([one for one in contenders.values() if one.side == side] for side in SIDES)
    found = [
        largest_differences(runs[a.name].steps, runs[b.name].steps, a.setting.beta)
        for runs in measured.rounds
        for a in ours
        for b in theirs
    ]
    return {name: max(one[name] for one in found) for name in found[0]}


@dataclass(frozen=True)
class _Speed:
    """Of one run's `steps` that count."""

    steps: int
    pairs: int
    tokens: int
    seconds: float

    @property
    def pairs_a_second(self) -> float:
        return self.pairs / self.seconds

    @property
    def tokens_a_second(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class _Timed:
    """`speeds`: by round."""

    quiet: bool
    reference: float
    speeds: Sequence[_Speed]


def _result(measured: Measured, name: str) -> Result:
    timed = _timed(measured, name)
    counted = [speed for speed in timed.speeds if speed.steps]
    runs = measured.runs(name)
    return Result(
        quiet=timed.quiet,
        steps=(sum(speed.steps for speed in counted) if timed.quiet else 0, len(runs) * len(measured.lengths)),
        reference_seconds=timed.reference,
        pairs_a_second=spread([speed.pairs_a_second for speed in counted]),
        tokens_a_second=spread([speed.tokens_a_second for speed in counted]),
        peak_bytes=spread([float(run.peak_bytes) for run in runs]),
    )


def _speed_ratio(measured: Measured, ours: str, theirs: str) -> Ratio:
    sides = [_timed(measured, name) for name in (ours, theirs)]
    both = [pair for pair in zip(*(side.speeds for side in sides), strict=True) if all(speed.steps for speed in pair)]
    if not (both and all(side.quiet for side in sides)):
        return replace(_speed_ratio(replace(measured, floor=0.0), ours, theirs), quiet=False)
    return Ratio(ours, theirs, spread([a.pairs_a_second / b.pairs_a_second for a, b in both]), quiet=True)


def _timed(measured: Measured, name: str) -> _Timed:
    """Of the quiet steps, with a share of the reference pass, as it was after a quiet start; of all, where there is no such
    step or no such start."""
    runs, floor = measured.runs(name), measured.floor
    passes = [run.reference_seconds for run in runs if run.watched.start.rate >= floor or not run.reference_seconds]
    reference = statistics.median(passes or [0.0])
    speeds = [_speed(run, measured.lengths, reference / measured.epochs, floor) for run in runs]
    if passes and any(speed.steps for speed in speeds):
        return _Timed(True, reference, speeds)
    return replace(_timed(replace(measured, floor=0.0), name), quiet=False)


def _speed(run: PeerRun, lengths: Sequence[Sequence[PairLengths]], reference: float, floor: float) -> _Speed:
    """`reference`: seconds a pair that come on top."""
    counted = [
        (step.seconds, pairs) for step, pairs in zip(run.watched.steps, lengths, strict=True) if step.rate >= floor
    ]
    pairs = [pair for _, step in counted for pair in step]
    seconds = sum(seconds for seconds, _ in counted) + reference * len(pairs)
    return _Speed(len(counted), len(pairs), sum(pair.separate for pair in pairs), seconds)
