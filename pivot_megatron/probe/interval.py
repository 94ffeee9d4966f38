"""95 % intervals for proportions, for means, and for differences on the same samples."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student

Z95 = 1.959963984540054
"""The 97.5 % quantile of the standard normal distribution."""


@dataclass(frozen=True)
class Interval:
    """A 95 % interval, `low <= high`."""

    low: float
    high: float

    @property
    def finite(self) -> bool:
        """False of what was measured once alone: it could be anything."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def as_record(self) -> dict[str, float | None]:
        """For JSON, which has no infinity."""
        return {"low": self.low, "high": self.high} if self.finite else {"low": None, "high": None}

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def wilson(correct: int, total: int) -> Interval:
    """The Wilson score interval of `correct` successes in `total` trials, within [0, 1]; [0, 1] for no trials.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    """
    if not 0 <= correct <= total:
        raise ValueError(f"expected 0 <= correct <= total, found correct={correct}, total={total}")
    if total == 0:
        return Interval(0.0, 1.0)
    rate = correct / total
    shrink = 1 + Z95**2 / total
    centre = (rate + Z95**2 / (2 * total)) / shrink
    half = Z95 / shrink * math.sqrt(rate * (1 - rate) / total + Z95**2 / (4 * total**2))
    # At 0 and at `total` one end is the rate itself; rounding would leave it a hair off.
    low = 0.0 if correct == 0 else centre - half
    high = 1.0 if correct == total else centre + half
    return Interval(low, high)


def mean_interval(values: Sequence[float]) -> Interval:
    """Student's interval of the mean of independent draws; from minus to plus infinity for fewer than two."""
    if len(values) < 2:
        return Interval(-math.inf, math.inf)
    mean = statistics.fmean(values)
    half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean - half, mean + half)


def crossed_mean(values: npt.NDArray[np.float64]) -> tuple[float, Interval]:
    """The mean of `[draws, samples]`, and its interval where other draws and other samples could have been had of each.

    Its variance is that of a two-way layout with both effects random: mean squares between draws and between samples, over the
    number of values; degrees of freedom by Satterthwaite. Both hold the residual's mean square, of which the variance has one:
    less it, the estimate would have no bias. It is left in, for a mean square between two or three draws is often small by
    chance, and the difference then says too little: of three draws whose share is the residual's or a few times that, 95 %
    intervals would hold the truth in 92.5 to 93.5 % of cases, as against 93.5 to 96.5 % here. The price is an interval some 1.4
    times as wide as need be where the residual is all there is, which holds it in 99 %. Of one draw it is Student's interval over
    samples, and of one sample over draws; of a single value it is without end.

    Source: Satterthwaite, "An approximate distribution of estimates of variance components", Biometrics Bulletin 2 (1946);
    expected mean squares: Searle, Casella and McCulloch, "Variance Components" (1992), chapter 4.
    """
    mean = float(values.mean())
    squares, weights = 0.0, 0.0
    for axis, others in ((0, 1), (1, 0)):
        if (count := values.shape[axis]) > 1:
            between = values.shape[others] * float(values.mean(axis=others).var(ddof=1))
            squares, weights = squares + between, weights + between**2 / (count - 1)
    if values.size < 2:
        return mean, Interval(-math.inf, math.inf)
    if squares == 0.0:
        return mean, Interval(mean, mean)
    half = float(student.ppf(0.975, squares**2 / weights)) * math.sqrt(squares / values.size)
    return mean, Interval(mean - half, mean + half)


def crossed_change(changes: npt.NDArray[np.float64]) -> tuple[float, Interval]:
    """The mean of `[draws, samples]` differences of what is right (1) or wrong (0), or of means of such, and its interval, within
    [-1, 1]: that of `crossed_mean` as if, in every draw, one sample more had been gained and one lost.

    So samples that agree everywhere leave an interval of some 3 / samples to either side, and rare differences one that holds
    the truth as often as it says. Of one draw it is Bonett and Price's adjusted Wald interval, with Student's quantile and an
    unbiased variance. Of a single value it is without end.

    Source: Bonett and Price, "Adjusted Wald confidence interval for a difference of binomial proportions based on paired data",
    J. Educ. Behav. Stat. 37 (2012).
    """
    if changes.size < 2:
        return crossed_mean(changes)
    gained = np.ones((len(changes), 1))
    _, found = crossed_mean(np.concatenate([changes, gained, -gained], axis=1))
    return float(changes.mean()), Interval(max(found.low, -1.0), min(found.high, 1.0))


def change_text(mean: float, interval: Interval) -> str:
    """A difference of two fractions and its interval, in per cent, that says plainly where zero lies inside."""
    told = f"{100 * mean:+.2f}"
    if not interval.finite:
        return f"{told} (a single value: no interval)"
    inside = ", inside the noise" if 0.0 in interval else ""
    return f"{told} ({100 * interval.low:+.2f} to {100 * interval.high:+.2f}{inside})"
