"""What the rounds of a layout come to, beside what a plan says of it. Pure: numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pivot_megatron.bench.layout_cases import Case
from pivot_megatron.bench.layout_job import RankFound
from pivot_megatron.bench.layout_runs import LayoutRun, Step
from pivot_megatron.bench.layouts import LayoutBench
from pivot_megatron.bench.spread import QUIET, Spread, spread
from pivot_megatron.bench.step_regions import SHARES
from pivot_megatron.plan.prediction import Prediction


@dataclass(frozen=True)
class LayoutSummary:
    """Speeds are of all processes together, over rounds that were made while the machine was `quiet`, or over all where none
    was; `rounds`: how many those are, of how many. `mfu`: `flops_a_second` over the machine's own best at matrix products.

    `peak_bytes`: by pipeline stage, of its rank with most, over all rounds. `shares` of a step's time by `SHARES`: of all ranks
    together, and by stage; each adds up to 1. `predicted`: where a plan was given.
    """

    name: str
    tensor: int
    pipeline: int
    virtual_pipeline: int
    data_parallel: int
    quiet: bool
    rounds: tuple[int, int]
    step_seconds: Spread
    pairs_a_second: Spread
    tokens_a_second: Spread
    flops_a_second: Spread
    mfu: Spread
    peak_bytes: tuple[int, ...]
    shares: Mapping[str, float]
    stage_shares: tuple[Mapping[str, float], ...]
    predicted: Prediction | None = None

    @property
    def step_off(self) -> float | None:
        """By how much the plan's step is longer than the measured one, as a share of that."""
        return None if self.predicted is None else self.predicted.step_seconds / self.step_seconds.median - 1

    @property
    def peak_off(self) -> float | None:
        """The same of the peak memory of the stage that takes most."""
        return None if self.predicted is None else max(self.predicted.peak_bytes) / max(self.peak_bytes) - 1


def summaries(found: LayoutBench) -> list[LayoutSummary]:
    """Of each layout that ran, the fastest first."""
    made = [
        summarise(case, found.runs[case.name], found.gemm_peak, found.predicted.get(case.name))
        for case in found.cases
        if found.runs[case.name]
    ]
    return sorted(made, key=lambda one: -one.pairs_a_second.median)


def summarise(
    case: Case, runs: Sequence[LayoutRun], gemm_peak: float, predicted: Prediction | None = None
) -> LayoutSummary:
    quiet = [run for run in runs if run.rate >= QUIET * gemm_peak]
    counted = quiet or runs

    def over_rounds(value: Callable[[Step], float], a_second: bool = True) -> Spread:
        return spread(
            [_sum(run, value) / (_sum(run, lambda s: s.seconds) if a_second else len(run.steps)) for run in counted]
        )

    flops = over_rounds(lambda step: step.flops)
    layout = case.layout
    stages = range(layout.pipeline)
    ranks = [rank for run in counted for rank in run.ranks]
    return LayoutSummary(
        name=case.name,
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        virtual_pipeline=layout.virtual_pipeline,
        data_parallel=case.data_parallel,
        quiet=bool(quiet),
        rounds=(len(counted), len(runs)),
        step_seconds=over_rounds(lambda step: step.seconds, a_second=False),
        pairs_a_second=over_rounds(lambda step: step.pairs),
        tokens_a_second=over_rounds(lambda step: step.tokens),
        flops_a_second=flops,
        mfu=Spread(flops.low / gemm_peak, flops.median / gemm_peak, flops.high / gemm_peak),
        peak_bytes=tuple(max(r.peak_bytes for run in runs for r in run.ranks if r.stage == stage) for stage in stages),
        shares=_shares(ranks),
        stage_shares=tuple(_shares(rank for rank in ranks if rank.stage == stage) for stage in stages),
        predicted=predicted,
    )


def _sum(run: LayoutRun, value: Callable[[Step], float]) -> float:
    return sum(value(step) for step in run.steps)


def _shares(ranks: Iterable[RankFound]) -> dict[str, float]:
    ranks = list(ranks)
    whole = sum(sum(rank.seconds.values()) for rank in ranks)
    return {part: sum(rank.seconds.get(part, 0.0) for rank in ranks) / whole for part in SHARES}
