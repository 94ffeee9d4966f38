"""What an objective gets and gives. Losses are sums: the trainer divides by the global count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class AnswerLogprobs:
    """Log-probs of answer tokens of one micro-batch.

    `policy` `[N]` float32 with gradient; `branch` `[N]` int64 names each token's branch, `branches` of them in all (chosen
    and rejected by turns where there are pairs); `reference` `[N]` of a frozen model, or None.
    """

    policy: Tensor
    branch: Tensor
    branches: int
    reference: Tensor | None = None

    def branch_sums(self, values: Tensor) -> Tensor:
        """`[branches]`: the sum of `[N]` values over each branch's tokens."""
        return torch.zeros(self.branches, dtype=values.dtype, device=values.device).index_add(0, self.branch, values)


@dataclass(frozen=True)
class LossSum:
    """`total`: a scalar summed over what `count` counts (tokens for SFT, pairs for DPO). `metrics`: sums, without gradient,
    each divided by the global `count` for reporting."""

    total: Tensor
    count: int
    metrics: Mapping[str, Tensor]


class Objective(Protocol):
    @property
    def needs_reference(self) -> bool: ...

    @property
    def branches(self) -> int:
        """Answers that a sample is trained on: 1, or 2 for a pair."""
        ...

    @property
    def metric_names(self) -> tuple[str, ...]: ...

    def __call__(self, answers: AnswerLogprobs) -> LossSum: ...

    @property
    def state(self) -> Mapping[str, float]:
        """What is kept from step to step, saved with a checkpoint; empty for an objective that keeps nothing."""
        ...

    def restored(self, state: Mapping[str, float]) -> Self:
        """This objective with another's `state`."""
        ...

    def observed(self, metrics: Mapping[str, float], count: int) -> Self:
        """This objective after a step: `metrics` are means over `count`, both over all ranks, and so is what is kept."""
        ...
