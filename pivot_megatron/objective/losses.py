"""Preference losses as pure functions: each returns `[pairs]`, one loss a pair, in the dtype of what it is given.

A reward is beta times a summed log-ratio, log p(answer) under the policy less that under the reference; a margin is the
chosen answer's less the rejected one's. All arguments named so are `[pairs]`.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid


def sigmoid(margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """DPO (Rafailov et al. 2023, eq. 7) of the reward margin. `label_smoothing` is the share of labels held to be flipped
    (conservative DPO)."""
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def robust(margin: Tensor, flip_rate: float) -> Tensor:
    """Robust DPO (Chowdhury et al. 2024) of the reward margin: where labels are flipped at `flip_rate`, under 0.5, its
    expectation is the sigmoid loss of the true labels. It has no lower bound."""
    as_labelled, flipped = -logsigmoid(margin), -logsigmoid(-margin)
    return ((1 - flip_rate) * as_labelled - flip_rate * flipped) / (1 - 2 * flip_rate)


def hinge(margin: Tensor) -> Tensor:
    """SLiC's hinge (Zhao et al. 2023) on the reward margin, as Liu et al. 2024 (RSO) put it: nothing is lost from 1 on."""
    return (1 - margin).relu()


def ipo(margin_per_token: Tensor, beta: float) -> Tensor:
    """IPO (Azar et al. 2024, eq. 17), the paper's tau as `beta`: the margin is drawn to 1 / (2 beta).

    `margin_per_token` is of log-ratios without beta, each divided by its own answer's tokens. The paper writes sums; its
    authors' results, and TRL, are of this form, in which long answers do not outweigh short ones.
    """
    return (margin_per_token - 1 / (2 * beta)).square()


def bco(chosen_rewards: Tensor, rejected_rewards: Tensor, baseline: float) -> Tensor:
    """Binary classifier optimisation (Jung et al. 2024) of both answers of a pair: the chosen one's reward above
    `baseline`, the rejected one's under it."""
    return -logsigmoid(chosen_rewards - baseline) - logsigmoid(baseline - rejected_rewards)


def sft(chosen_logps: Tensor, chosen_tokens: Tensor) -> Tensor:
    """Mean negative log-likelihood of the chosen answer's tokens, pair by pair: a long answer counts as much as a short one."""
    return -chosen_logps / chosen_tokens
