"""Supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pivot_megatron.objective.types import AnswerLogprobs, LossSum


class SftObjective:
    """Negative log-likelihood of answer tokens, counted in tokens."""

    needs_reference: ClassVar[bool] = False
    branches: ClassVar[int] = 1
    metric_names: ClassVar[tuple[str, ...]] = ()
    state: ClassVar[Mapping[str, float]] = {}

    def __call__(self, answers: AnswerLogprobs) -> LossSum:
        return LossSum(-answers.policy.sum(), answers.policy.numel(), {})

    def restored(self, state: Mapping[str, float]) -> SftObjective:
        return self

    def observed(self, metrics: Mapping[str, float], count: int) -> SftObjective:
        return self
