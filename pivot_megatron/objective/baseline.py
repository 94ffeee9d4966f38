"""The running mean of rewards that BCO measures against."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RewardBaseline:
    """The mean over all rewards seen, chosen and rejected alike (Jung et al. 2024): `total` of `count` rewards.

    It grows by whole optimizer steps, of rewards summed over all ranks, so a step's baseline is the mean over all earlier
    steps, 0 in the first. It is therefore one number under every layout and micro-batch size.
    """

    total: float = 0.0
    count: float = 0.0

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0

    def after(self, chosen_mean: float, rejected_mean: float, pairs: int) -> RewardBaseline:
        """With a step's rewards, as means over its `pairs`."""
        return RewardBaseline(self.total + (chosen_mean + rejected_mean) * pairs, self.count + 2 * pairs)
