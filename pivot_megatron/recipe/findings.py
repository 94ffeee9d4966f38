"""What the numbers of a report allow one to say: proportions with their intervals, and their differences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from pivot_megatron.probe.interval import Interval, difference, wilson
from pivot_megatron.recipe.record import AnswerScore, DemoReport, PreferenceScore, ProbeScore
from pivot_megatron.report.intervals import verdict


@dataclass(frozen=True)
class Estimate:
    """A proportion that was measured, with its 95 % interval. `total` is the number of samples."""

    value: float
    interval: Interval
    total: int


@dataclass(frozen=True)
class Measure:
    """One proportion, measured on several models (for a probe: on their encoders)."""

    name: str
    estimates: Mapping[str, Estimate]


@dataclass(frozen=True)
class Comparison:
    """`second` less `first` in one measure, as a fraction, with its 95 % interval."""

    measure: str
    first: str
    second: str
    change: float
    interval: Interval

    @property
    def verdict(self) -> str:
        """`higher`, `lower`, or INSIDE where the interval of the difference holds zero."""
        return verdict(self.change, self.interval.low, self.interval.high)


def measures(report: DemoReport) -> list[Measure]:
    """The report's headline numbers: answers and preferences over all tasks, then a probe per dataset."""
    found = [
        Measure("answer accuracy", pooled(report.answers)),
        Measure("preference accuracy", pooled(report.preference)),
    ]
    for dataset in dict.fromkeys(probe.dataset for probe in report.probes):
        scores = [probe for probe in report.probes if probe.dataset == dataset]
        found.append(Measure(f"probe: {dataset}", {score.encoder: probe_estimate(score) for score in scores}))
    return [measure for measure in found if measure.estimates]


def models(found: Sequence[Measure]) -> list[str]:
    """Every model that was measured, those of the longest measure first: it most likely holds them all, in order."""
    by_length = sorted(found, key=lambda measure: -len(measure.estimates))
    return list(dict.fromkeys(model for measure in by_length for model in measure.estimates))


def comparisons(measure: Measure) -> list[Comparison]:
    """Every two models of a measure, the later less the earlier."""
    return [
        Comparison(
            measure=measure.name,
            first=first,
            second=second,
            change=b.value - a.value,
            interval=difference(a.value, a.interval, b.value, b.interval),
        )
        for (first, a), (second, b) in combinations(measure.estimates.items(), 2)
    ]


def pooled(scores: Sequence[AnswerScore] | Sequence[PreferenceScore]) -> dict[str, Estimate]:
    """Per model, all samples of the tasks that every model was scored on, taken together."""
    tasks: dict[str, set[str]] = {}
    for score in scores:
        tasks.setdefault(score.model, set()).add(score.task)
    shared = set.intersection(*tasks.values()) if tasks else set()
    counts = {
        model: [(score.correct, score.total) for score in scores if score.model == model and score.task in shared]
        for model in tasks
    }
    sums = {model: (sum(c for c, _ in pairs), sum(t for _, t in pairs)) for model, pairs in counts.items()}
    return {model: estimate(correct, total) for model, (correct, total) in sums.items() if total}


def estimate(correct: int, total: int) -> Estimate:
    """A proportion with its Wilson interval; 0 with [0, 1] for no samples."""
    return Estimate(correct / total if total else 0.0, wilson(correct, total), total)


def probe_estimate(score: ProbeScore) -> Estimate:
    """A probe's accuracy in the form that `comparisons` reads."""
    return Estimate(score.accuracy, Interval(score.low, score.high), score.total)
