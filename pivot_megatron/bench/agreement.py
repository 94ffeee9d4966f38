"""How far two trainers' steps lie apart, from the lines of their metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

EXACT = ("loss", "chosen_logps", "rejected_logps", "grad_norm")
REWARDS = ("chosen_rewards", "rejected_rewards", "reward_margin")
_FLOAT32_EPSILON = 2.0**-23

Lines = Sequence[Mapping[str, float]]


def largest_differences(found: Lines, wanted: Lines, beta: float) -> dict[str, float]:
    """Per metric the largest relative difference over the steps; for rewards, of what rounding does not explain."""
    if len(found) != len(wanted):
        raise ValueError(f"{len(found)} steps against {len(wanted)}")
    steps = list(zip(found, wanted, strict=True))
    worst = {name: max(_relative(a[name] - b[name], b[name]) for a, b in steps) for name in EXACT}
    for name in REWARDS:
        worst[name] = max(_past_rounding(a[name] - b[name], b, name, beta) for a, b in steps)
    return worst


def rounding(line: Mapping[str, float], beta: float) -> float:
    """By how much a reward may differ through rounding alone.

    A reward is beta times a difference of log-probs, each a sum over an answer and some hundreds in size, that nearly
    cancel: at the first step exactly. Each of policy and reference, of chosen and rejected, is known to a few units in its
    last place, however small the difference is.
    """
    units = 2.0
    sums = 2 * (abs(line["chosen_logps"]) + abs(line["rejected_logps"]))
    return beta * sums * units * _FLOAT32_EPSILON


def _past_rounding(difference: float, wanted: Mapping[str, float], name: str, beta: float) -> float:
    return _relative(max(abs(difference) - rounding(wanted, beta), 0.0), wanted[name])


def _relative(difference: float, wanted: float) -> float:
    if not math.isfinite(difference):
        return math.inf
    if difference == 0.0:
        return 0.0
    return abs(difference / wanted) if wanted else math.inf
