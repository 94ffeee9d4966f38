"""Direct preference optimisation and its kin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from pivot_megatron.config.schema import PairLoss
from pivot_megatron.objective import losses
from pivot_megatron.objective.baseline import RewardBaseline
from pivot_megatron.objective.types import AnswerLogprobs, LossSum

_METRICS = (
    "chosen_logps",
    "rejected_logps",
    "chosen_rewards",
    "rejected_rewards",
    "reward_margin",
    "reward_accuracy",
)


@dataclass(frozen=True)
class Pairs:
    """What the losses of a micro-batch are made of, `[pairs, 2]` each, chosen answers before rejected ones: `logps` and
    `log_ratios` (to the reference) summed over each answer's tokens, and how many `tokens` those are."""

    logps: Tensor
    log_ratios: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, answers: AnswerLogprobs) -> Pairs:
        if answers.reference is None:
            raise ValueError("DPO needs reference log-probs")
        policy = answers.branch_sums(answers.policy)
        reference = answers.branch_sums(answers.reference)
        tokens = answers.branch_sums(torch.ones_like(answers.policy))
        return cls(policy.view(-1, 2), (policy - reference).view(-1, 2), tokens.view(-1, 2))


@dataclass(frozen=True)
class DpoObjective:
    """A weighted sum of losses over pairs, counted in pairs. `losses`: weight by name.

    `baseline` is the state that BCO brings; without it nothing is kept.
    """

    beta: float
    label_smoothing: float
    losses: Mapping[PairLoss, float]
    baseline: RewardBaseline = field(default_factory=RewardBaseline)

    needs_reference: ClassVar[bool] = True
    branches: ClassVar[int] = 2

    @property
    def metric_names(self) -> tuple[str, ...]:
        return (*_METRICS, "reward_baseline") if self._has_baseline else _METRICS

    def __call__(self, answers: AnswerLogprobs) -> LossSum:
        pairs = Pairs.of(answers)
        # Sorted, for a sum in another order may round otherwise, and a config's mapping has no order.
        weighted = [weight * self._loss(name, pairs).sum() for name, weight in sorted(self.losses.items())]
        (chosen_logps, rejected_logps), (chosen, rejected) = pairs.logps.T, self.beta * pairs.log_ratios.T
        metrics = {
            "chosen_logps": chosen_logps,
            "rejected_logps": rejected_logps,
            "chosen_rewards": chosen,
            "rejected_rewards": rejected,
            "reward_margin": chosen - rejected,
            "reward_accuracy": (chosen > rejected).float(),
        }
        if self._has_baseline:
            metrics["reward_baseline"] = torch.full_like(chosen, self.baseline.mean)
        sums = {name: value.detach().sum() for name, value in metrics.items()}
        return LossSum(torch.stack(weighted).sum(), answers.branches // 2, sums)

    def _loss(self, name: PairLoss, pairs: Pairs) -> Tensor:
        """`[pairs]`."""
        chosen, rejected = self.beta * pairs.log_ratios.T
        match name:
            case "sigmoid":
                return losses.sigmoid(chosen - rejected, self.label_smoothing)
            case "robust":
                return losses.robust(chosen - rejected, self.label_smoothing)
            case "hinge":
                return losses.hinge(chosen - rejected)
            case "ipo":
                per_token = pairs.log_ratios / pairs.tokens
                return losses.ipo(per_token[:, 0] - per_token[:, 1], self.beta)
            case "bco":
                return losses.bco(chosen, rejected, self.baseline.mean)
            case "sft":
                return losses.sft(pairs.logps[:, 0], pairs.tokens[:, 0])

    @property
    def _has_baseline(self) -> bool:
        return "bco" in self.losses

    @property
    def state(self) -> Mapping[str, float]:
        return asdict(self.baseline) if self._has_baseline else {}

    def restored(self, state: Mapping[str, float]) -> DpoObjective:
        return replace(self, baseline=RewardBaseline(**state))

    def observed(self, metrics: Mapping[str, float], count: int) -> DpoObjective:
        if not self._has_baseline:
            return self
        after = self.baseline.after(metrics["chosen_rewards"], metrics["rejected_rewards"], count)
        return replace(self, baseline=after)
