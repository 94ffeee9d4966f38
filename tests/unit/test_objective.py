"""Objectives against closed forms and finite differences, in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pivot_megatron.config.schema import Dpo, Sft
from pivot_megatron.objective.build import build_objective
from pivot_megatron.objective.dpo import DpoObjective
from pivot_megatron.objective.types import AnswerLogprobs, LossSum
from pivot_megatron.train.step import StepResult, observed

# Two pairs: branches 0, 1 (chosen, rejected) and 2, 3, of uneven lengths.
BRANCH = torch.tensor([0, 0, 0, 1, 2, 3, 3])
STATE = {"total": -3.5, "count": 10.0}  # a baseline of -0.35


def answers(seed: int = 0, grad: bool = True) -> AnswerLogprobs:
    generator = torch.Generator().manual_seed(seed)
    policy = -torch.rand(7, generator=generator, dtype=torch.float64) * 3
    reference = -torch.rand(7, generator=generator, dtype=torch.float64) * 3
    return AnswerLogprobs(policy.requires_grad_(grad), BRANCH, 4, reference)


def judge_of(config: Dpo) -> DpoObjective:
    judge = build_objective(config)
    assert isinstance(judge, DpoObjective)
    return judge


def by_hand(a: AnswerLogprobs, objective: Dpo, baseline: float = 0.0) -> float:
    """The papers' formulas in plain arithmetic: probabilities and logarithms, no log-sigmoid."""
    assert a.reference is not None
    p, r = a.policy.detach().tolist(), a.reference.tolist()
    beta, smooth = objective.beta, objective.label_smoothing
    total = 0.0
    for chosen, rejected in (((0, 1, 2), (3,)), ((4,), (5, 6))):
        won = sum(p[i] - r[i] for i in chosen)
        lost = sum(p[i] - r[i] for i in rejected)
        prefers = 1 / (1 + math.exp(-beta * (won - lost)))  # Bradley-Terry
        per_token = won / len(chosen) - lost / len(rejected)
        values = {
            "sigmoid": -(1 - smooth) * math.log(prefers) - smooth * math.log(1 - prefers),
            "robust": (-(1 - smooth) * math.log(prefers) + smooth * math.log(1 - prefers)) / (1 - 2 * smooth),
            "hinge": max(0.0, 1 - beta * (won - lost)),
            "ipo": (per_token - 1 / (2 * beta)) ** 2,
            "bco": math.log(1 + math.exp(baseline - beta * won)) + math.log(1 + math.exp(beta * lost - baseline)),
            "sft": -sum(p[i] for i in chosen) / len(chosen),
        }
        total += sum(weight * values[name] for name, weight in objective.losses.items())
    return total


MPO = Dpo(beta=0.1, losses={"sigmoid": 0.8, "bco": 0.2, "sft": 1.0})
CASES = {
    "sigmoid": Dpo(),
    "conservative": Dpo(beta=0.7, label_smoothing=0.2),
    "robust": Dpo(beta=0.7, label_smoothing=0.2, losses={"robust": 1.0}),
    "hinge": Dpo(beta=0.7, losses={"hinge": 1.0}),
    "hinge-reached": Dpo(beta=3.0, losses={"hinge": 1.0}),
    "ipo": Dpo(beta=0.4, losses={"ipo": 1.0}),
    "bco": Dpo(beta=0.3, losses={"bco": 1.0}),
    "sigmoid-sft": Dpo(beta=0.3, losses={"sigmoid": 1.0, "sft": 0.5}),
    "mpo": MPO,
    "all": Dpo("dpo", 0.6, 0.1, {"sigmoid": 0.3, "robust": 0.4, "hinge": 0.5, "ipo": 0.6, "bco": 0.7, "sft": 0.8}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_loss_equals_its_formula(name: str) -> None:
    a = answers(seed=3)
    judge = judge_of(CASES[name])
    result = judge(a)
    assert result.count == 2
    assert float(result.total) == pytest.approx(by_hand(a, CASES[name]), rel=1e-12)
    moved = judge.restored(STATE)(a)
    assert float(moved.total) == pytest.approx(by_hand(a, CASES[name], baseline=-0.35), rel=1e-12)


@pytest.mark.parametrize("objective", [*CASES.values(), Sft()], ids=[*CASES, "sft"])
def test_gradient_by_finite_differences(objective: Dpo | Sft) -> None:
    base = answers(seed=3)
    judge = build_objective(objective)
    judge = judge.restored(STATE)

    def loss(policy: torch.Tensor) -> torch.Tensor:
        return judge(AnswerLogprobs(policy, BRANCH, 4, base.reference)).total

    assert torch.autograd.gradcheck(loss, (base.policy,), eps=1e-6, atol=1e-8)


def test_the_hinge_cases_lie_on_both_sides_of_its_edge() -> None:
    judge = judge_of(CASES["hinge-reached"])
    per_pair = [float(judge(pairs_of(answers(seed=3), [i])).total) for i in (0, 1)]
    assert min(per_pair) == 0 < max(per_pair)


def test_robust_loss_is_right_on_average_over_flipped_labels() -> None:
    """What its paper is about: with labels flipped at its rate, its mean is the sigmoid loss of the true labels."""
    rate = 0.3
    a = answers()
    flipped = AnswerLogprobs(a.policy, BRANCH ^ 1, 4, a.reference)
    judge = judge_of(Dpo(beta=0.5, label_smoothing=rate, losses={"robust": 1.0}))
    average = (1 - rate) * judge(a).total + rate * judge(flipped).total
    assert float(average) == pytest.approx(float(judge_of(Dpo(beta=0.5))(a).total), rel=1e-12)


def test_dpo_metrics_are_sums_over_pairs() -> None:
    a = answers(seed=1)
    assert a.reference is not None
    judge = judge_of(Dpo(beta=0.5, losses={"bco": 1.0})).restored(STATE)
    metrics = judge(a).metrics
    p, r = a.policy.detach(), a.reference
    chosen = [p[:3].sum() - r[:3].sum(), p[4] - r[4]]
    rejected = [p[3] - r[3], p[5:].sum() - r[5:].sum()]
    assert tuple(metrics) == judge.metric_names
    assert float(metrics["chosen_logps"]) == pytest.approx(float(p[:3].sum() + p[4]))
    assert float(metrics["reward_margin"]) == pytest.approx(0.5 * float(sum(chosen) - sum(rejected)))
    assert float(metrics["reward_accuracy"]) == sum(float(c > j) for c, j in zip(chosen, rejected))
    assert float(metrics["reward_baseline"]) == pytest.approx(2 * -0.35)
    assert "reward_baseline" not in judge_of(Dpo()).metric_names


def test_equal_models_lose_log_two_a_pair() -> None:
    a = answers(seed=2)
    same = AnswerLogprobs(a.policy, BRANCH, 4, a.policy.detach())
    assert float(build_objective(Dpo())(same).total) == pytest.approx(2 * math.log(2), rel=1e-12)


def pairs_of(whole: AnswerLogprobs, picked: list[int]) -> AnswerLogprobs:
    """A micro-batch of some of the pairs, in the order named."""
    assert whole.reference is not None
    tokens, branch = [], []
    for place, pair in enumerate(picked):
        for side in (0, 1):
            own = (whole.branch == 2 * pair + side).nonzero().flatten().tolist()
            tokens += own
            branch += [2 * place + side] * len(own)
    policy, reference = (x[tokens] for x in (whole.policy.detach(), whole.reference))
    return AnswerLogprobs(policy, torch.tensor(branch, dtype=torch.long), 2 * len(picked), reference)


@given(
    lengths=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=8),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_any_split_into_micro_batches_gives_the_same_sums(lengths, seed: int, data: st.DataObject) -> None:
    """And so, from the sums, the same baseline for the next step."""
    sides = [length for pair in lengths for length in pair]
    branch = torch.tensor([i for i, length in enumerate(sides) for _ in range(length)])
    generator = torch.Generator().manual_seed(seed)
    policy, reference = -5 * torch.rand(2, len(branch), generator=generator, dtype=torch.float64)
    whole = AnswerLogprobs(policy, branch, len(sides), reference)
    order = data.draw(st.permutations(range(len(lengths))))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(lengths)))) | {0, len(lengths)})
    judge = judge_of(CASES["all"]).restored(STATE)
    parts = [judge(pairs_of(whole, list(order[a:b]))) for a, b in pairwise(cuts)]
    at_once = judge(whole)
    assert sum(part.count for part in parts) == at_once.count == len(lengths)
    assert float(sum(part.total for part in parts)) == pytest.approx(float(at_once.total), rel=1e-12)
    assert after(judge, parts).baseline.mean == pytest.approx(after(judge, [at_once]).baseline.mean, rel=1e-12)


def after(judge: DpoObjective, parts: list[LossSum]) -> DpoObjective:
    """After a step of these micro-batches, as the trainer has it: means over the global count."""
    count = sum(part.count for part in parts)
    means = {name: sum(float(part.metrics[name]) for part in parts) / max(count, 1) for name in judge.metric_names}
    moved = observed(judge, StepResult(0.0, 0.0, 0.0, count, means, applied=True))
    assert isinstance(moved, DpoObjective)
    return moved


def test_the_baseline_is_the_mean_reward_of_all_earlier_steps() -> None:
    judge = judge_of(MPO)
    rewards: list[float] = []
    for seed, picked in ((0, [0, 1]), (1, [1]), (2, []), (3, [0, 1])):
        part = judge(pairs_of(answers(seed), picked))
        expected = sum(rewards) / len(rewards) if rewards else 0.0
        assert judge.baseline.mean == pytest.approx(expected, abs=1e-15)
        assert float(part.metrics["reward_baseline"]) == pytest.approx(len(picked) * expected, abs=1e-15)
        a = pairs_of(answers(seed), picked)
        assert a.reference is not None
        ratios = a.policy - a.reference
        rewards += [0.1 * float(ratios[a.branch == i].sum()) for i in range(a.branches)]
        judge = after(judge, [part])
    assert judge.state == {"total": pytest.approx(sum(rewards)), "count": len(rewards)}


def test_state_goes_around_and_stands_still_where_it_should() -> None:
    judge = judge_of(MPO).restored(STATE)
    assert judge.state == STATE
    assert judge_of(MPO).restored({}).state == judge_of(MPO).state
    result = StepResult(0.0, 0.0, 0.0, 4, dict.fromkeys(judge.metric_names, 1.0), applied=True)
    assert observed(judge, result).state == {"total": 4.5, "count": 18.0}
    assert observed(judge, replace(result, applied=False)).state == STATE
    for stateless in (Dpo(), Sft()):
        other = build_objective(stateless)
        assert other.state == observed(other, result).state == {}


def test_sft_counts_tokens() -> None:
    a = answers()
    result = build_objective(Sft())(AnswerLogprobs(a.policy, torch.zeros(7, dtype=torch.long), 1))
    assert (float(result.total), result.count) == (pytest.approx(-float(a.policy.sum())), 7)


def test_nothing_is_a_zero_loss_with_zero_count() -> None:
    """A micro-batch whose samples were all dropped: it adds nothing, and its metrics are numbers."""
    empty = torch.zeros(0, dtype=torch.float64)
    nothing = AnswerLogprobs(empty.requires_grad_(), torch.zeros(0, dtype=torch.long), 0, empty.detach())
    for objective in (CASES["all"], Sft()):
        result = build_objective(objective)(nothing)
        assert (float(result.total), result.count) == (0.0, 0)
        assert all(float(v) == 0.0 for v in result.metrics.values())
        result.total.backward()


def test_dpo_without_reference_is_an_error() -> None:
    with pytest.raises(ValueError, match="reference"):
        build_objective(Dpo())(AnswerLogprobs(answers().policy, BRANCH, 4))
