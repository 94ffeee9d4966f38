"""Direct preference optimisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pivot_megatron.objective.types import AnswerLogprobs, LossSum


def sigmoid_loss(margin: Tensor, label_smoothing: float) -> Tensor:
    """Per-pair loss of the scaled log-ratio margin (Rafailov et al. 2023, eq. 7); `label_smoothing` is the share of labels
    held to be flipped (conservative DPO)."""
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


@dataclass(frozen=True)
class DpoObjective:
    """Sigmoid DPO over sums of answer log-probs, counted in pairs.

    `sft_weight` adds that much of the chosen answers' mean token negative log-likelihood, pair by pair.
    """

    beta: float
    label_smoothing: float = 0.0
    sft_weight: float = 0.0

    needs_reference: ClassVar[bool] = True
    branches: ClassVar[int] = 2
    metric_names: ClassVar[tuple[str, ...]] = (
        "chosen_logps",
        "rejected_logps",
        "chosen_rewards",
        "rejected_rewards",
        "reward_margin",
        "reward_accuracy",
    )

    def __call__(self, answers: AnswerLogprobs) -> LossSum:
        if answers.reference is None:
            raise ValueError("DPO needs reference log-probs")
        policy = answers.branch_sums(answers.policy)
        reference = answers.branch_sums(answers.reference)
        rewards = self.beta * (policy - reference)
        chosen, rejected = rewards[0::2], rewards[1::2]
        total = sigmoid_loss(chosen - rejected, self.label_smoothing).sum()
        if self.sft_weight:
            tokens = answers.branch_sums(torch.ones_like(answers.policy))
            total = total - self.sft_weight * (policy[0::2] / tokens[0::2]).sum()
        metrics = {
            "chosen_logps": policy[0::2],
            "rejected_logps": policy[1::2],
            "chosen_rewards": chosen,
            "rejected_rewards": rejected,
            "reward_margin": chosen - rejected,
            "reward_accuracy": (chosen > rejected).float(),
        }
        return LossSum(total, answers.branches // 2, {name: value.detach().sum() for name, value in metrics.items()})
