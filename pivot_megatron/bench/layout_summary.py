"""What the rounds of a layout come to, beside what a plan says of it. Pure: numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from pivot_megatron.bench.layout_cases import Case
from pivot_megatron.bench.layout_job import RankFound
from pivot_megatron.bench.layout_runs import LayoutRun, Step
from pivot_megatron.bench.layouts import LayoutBench
from pivot_megatron.bench.spread import QUIET, Spread, spread
from pivot_megatron.bench.step_regions import SHARES
from pivot_megatron.plan.prediction import Prediction


@dataclass(frozen=True)
class LayoutSummary:
    """Speeds are of all processes together, a value a round, over steps that were made while the machine was `quiet`, or over
    all where none was; `steps`: how many those are, of how many. `mfu`: `flops_a_second` over the machine's own best at matrix
    products.

    `peak_bytes`: by pipeline stage, of its rank with most, over all rounds. `shares` of a step's time by `SHARES`: of all ranks
    together, and by stage; each adds up to 1. `predicted`: where a plan was given; `pace`: what the machine multiplied matrices
    at beside these steps over what it did as it was calibrated.
    """

    name: str
    tensor: int
    pipeline: int
    virtual_pipeline: int
    data_parallel: int
    quiet: bool
    steps: tuple[int, int]
    step_seconds: Spread
    pairs_a_second: Spread
    tokens_a_second: Spread
    flops_a_second: Spread
    mfu: Spread
    peak_bytes: tuple[int, ...]
    shares: Mapping[str, float]
    stage_shares: tuple[Mapping[str, float], ...]
    predicted: Prediction | None = None
    pace: float = 1.0

    @property
    def step_off(self) -> float | None:
        """By how much the plan's step is longer than the measured one, as a share of that."""
        return None if self.predicted is None else self.predicted.step_seconds / self.step_seconds.median - 1

    @property
    def step_off_at_pace(self) -> float | None:
        """The same of the plan's step at the machine's pace of these steps."""
        off = self.step_off
        return None if off is None else (off + 1) / self.pace - 1

    @property
    def peak_off(self) -> float | None:
        """The same of the peak memory of the stage that takes most."""
        return None if self.predicted is None else max(self.predicted.peak_bytes) / max(self.peak_bytes) - 1


def summaries(found: LayoutBench) -> list[LayoutSummary]:
    """Of each layout that ran, the fastest first."""
    made = [
        summarise(case, found.runs[case.name], found.gemm_peak, found.predicted.get(case.name), found.calibrated)
        for case in found.cases
        if found.runs[case.name]
    ]
    return sorted(made, key=lambda one: -one.pairs_a_second.median)


def summarise(
    case: Case,
    runs: Sequence[LayoutRun],
    gemm_peak: float,
    predicted: Prediction | None = None,
    calibrated: float = 0.0,
) -> LayoutSummary:
    """`calibrated`: FLOP/s that the machine multiplied matrices at when it was, where it was."""
    quiet = [(run, [step for step in run.steps if step.rate >= QUIET * gemm_peak]) for run in runs]
    counted = [(run, steps) for run, steps in quiet if steps] or [(run, list(run.steps)) for run in runs]
    rates = [step.rate for _, steps in counted for step in steps]

    def over_rounds(value: Callable[[Step], float], a_second: bool = True) -> Spread:
        return spread(
            [
                sum(map(value, steps)) / (sum(step.seconds for step in steps) if a_second else len(steps))
                for _, steps in counted
            ]
        )

    flops = over_rounds(lambda step: step.flops)
    layout = case.layout
    stages = range(layout.pipeline)
    ranks = [rank for run, _ in counted for rank in run.ranks]
    return LayoutSummary(
        name=case.name,
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        virtual_pipeline=layout.virtual_pipeline,
        data_parallel=case.data_parallel,
        quiet=any(steps for _, steps in quiet),
        steps=(len(rates), sum(len(run.steps) for run in runs)),
        step_seconds=over_rounds(lambda step: step.seconds, a_second=False),
        pairs_a_second=over_rounds(lambda step: step.pairs),
        tokens_a_second=over_rounds(lambda step: step.tokens),
        flops_a_second=flops,
        mfu=Spread(flops.low / gemm_peak, flops.median / gemm_peak, flops.high / gemm_peak),
        peak_bytes=tuple(max(r.peak_bytes for run in runs for r in run.ranks if r.stage == stage) for stage in stages),
        shares=_shares(ranks),
        stage_shares=tuple(_shares(rank for rank in ranks if rank.stage == stage) for stage in stages),
        predicted=predicted,
        pace=median(rates) / calibrated if calibrated else 1.0,
    )


def _shares(ranks: Iterable[RankFound]) -> dict[str, float]:
    ranks = list(ranks)
    whole = sum(sum(rank.seconds.values()) for rank in ranks)
    return {part: sum(rank.seconds.get(part, 0.0) for rank in ranks) / whole for part in SHARES}
