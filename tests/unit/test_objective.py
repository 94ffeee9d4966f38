"""Objectives against closed forms and finite differences, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from pivot_megatron.config.schema import Dpo, Sft
from pivot_megatron.objective.build import build_objective
from pivot_megatron.objective.types import AnswerLogprobs

# Two pairs: branches 0, 1 (chosen, rejected) and 2, 3, of uneven lengths.
BRANCH = torch.tensor([0, 0, 0, 1, 2, 3, 3])


def answers(seed: int = 0, grad: bool = True) -> AnswerLogprobs:
    generator = torch.Generator().manual_seed(seed)
    policy = -torch.rand(7, generator=generator, dtype=torch.float64) * 3
    reference = -torch.rand(7, generator=generator, dtype=torch.float64) * 3
    return AnswerLogprobs(policy.requires_grad_(grad), BRANCH, 4, reference)


def by_hand(a: AnswerLogprobs, objective: Dpo) -> float:
    """Rafailov et al. 2023, eq. 7, with label smoothing and the SFT term, in plain arithmetic."""
    assert a.reference is not None
    p, r = a.policy.detach().tolist(), a.reference.tolist()
    total = 0.0
    for chosen, rejected in (((0, 1, 2), (3,)), ((4,), (5, 6))):
        margin = objective.beta * (
            sum(p[i] for i in chosen)
            - sum(r[i] for i in chosen)
            - sum(p[i] for i in rejected)
            + sum(r[i] for i in rejected)
        )
        sigmoid = 1 / (1 + math.exp(-margin))
        total += -(1 - objective.label_smoothing) * math.log(sigmoid) - objective.label_smoothing * math.log(
            1 - sigmoid
        )
        total += -objective.sft_weight * sum(p[i] for i in chosen) / len(chosen)
    return total


@pytest.mark.parametrize("objective", [Dpo(), Dpo(beta=0.7, label_smoothing=0.2), Dpo(beta=0.3, sft_weight=0.5)])
def test_dpo_equals_its_formula(objective: Dpo) -> None:
    a = answers()
    result = build_objective(objective)(a)
    assert result.count == 2
    assert float(result.total) == pytest.approx(by_hand(a, objective), rel=1e-12)


@pytest.mark.parametrize("objective", [Dpo(beta=0.7, label_smoothing=0.2, sft_weight=0.4), Sft()])
def test_gradient_by_finite_differences(objective: Dpo | Sft) -> None:
    base = answers(seed=3)
    judge = build_objective(objective)

    def loss(policy: torch.Tensor) -> torch.Tensor:
        return judge(AnswerLogprobs(policy, BRANCH, 4, base.reference)).total

    assert torch.autograd.gradcheck(loss, (base.policy,), eps=1e-6, atol=1e-8)


def test_dpo_metrics_are_sums_over_pairs() -> None:
    a = answers(seed=1)
    assert a.reference is not None
    metrics = build_objective(Dpo(beta=0.5))(a).metrics
    p, r = a.policy.detach(), a.reference
    chosen = [p[:3].sum() - r[:3].sum(), p[4] - r[4]]
    rejected = [p[3] - r[3], p[5:].sum() - r[5:].sum()]
    assert float(metrics["chosen_logps"]) == pytest.approx(float(p[:3].sum() + p[4]))
    assert float(metrics["reward_margin"]) == pytest.approx(0.5 * float(sum(chosen) - sum(rejected)))
    assert float(metrics["reward_accuracy"]) == sum(float(c > j) for c, j in zip(chosen, rejected))


def test_equal_models_lose_log_two_a_pair() -> None:
    a = answers(seed=2)
    same = AnswerLogprobs(a.policy, BRANCH, 4, a.policy.detach())
    assert float(build_objective(Dpo())(same).total) == pytest.approx(2 * math.log(2), rel=1e-12)


def test_sft_counts_tokens() -> None:
    a = answers()
    result = build_objective(Sft())(AnswerLogprobs(a.policy, torch.zeros(7, dtype=torch.long), 1))
    assert (float(result.total), result.count) == (pytest.approx(-float(a.policy.sum())), 7)


def test_nothing_is_a_zero_loss_with_zero_count() -> None:
    """A micro-batch whose samples were all dropped: it adds nothing, and its metrics are numbers."""
    empty = torch.zeros(0, dtype=torch.float64)
    nothing = AnswerLogprobs(empty.requires_grad_(), torch.zeros(0, dtype=torch.long), 0, empty.detach())
    for objective in (Dpo(sft_weight=1.0), Sft()):
        result = build_objective(objective)(nothing)
        assert (float(result.total), result.count) == (0.0, 0)
        assert all(float(v) == 0.0 for v in result.metrics.values())


def test_dpo_without_reference_is_an_error() -> None:
    with pytest.raises(ValueError, match="reference"):
        build_objective(Dpo())(AnswerLogprobs(answers().policy, BRANCH, 4))
