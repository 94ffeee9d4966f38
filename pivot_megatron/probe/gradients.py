"""One sample through the trainer's own model: a few steps of overfitting, and the gradient at its image's tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from pivot_megatron.data.batch import PackedBatch
from pivot_megatron.model.composition import Stage
from pivot_megatron.objective.types import AnswerLogprobs, Objective

Place = Literal["input", "output"]
"""Of the projector."""


def mean_loss(model: Stage, batch: PackedBatch, objective: Objective) -> Tensor:
    """A scalar: over pairs, or over the chosen answer's tokens, as the objective counts."""
    logprobs = model.whole(batch)
    found = objective(AnswerLogprobs(logprobs, batch.branch, batch.branches, batch.reference))
    return found.total / found.count


def with_reference(model: Stage, batch: PackedBatch) -> PackedBatch:
    """With the log-probs of the model as it stands, for objectives that measure against a reference."""
    with torch.no_grad():
        return replace(batch, reference=model.whole(batch))


def overfit(model: Stage, batch: PackedBatch, objective: Objective, steps: int, rate: float) -> list[float]:
    """`steps` of AdamW on everything that trains, at a constant rate, with betas 0.9 and 0.999, without decay or clipping.
    Returns the loss before each."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = mean_loss(model, batch, objective)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    optimizer.zero_grad()
    return losses


def put_back(model: Stage) -> Callable[[], None]:
    """What makes every weight again what it is now; they are kept on the host."""
    kept = [parameter.detach().to("cpu", copy=True) for parameter in model.parameters()]

    @torch.no_grad()
    def again() -> None:
        for parameter, value in zip(model.parameters(), kept, strict=True):
            parameter.copy_(value)

    return again


def patch_gradient(model: Stage, batch: PackedBatch, objective: Objective, at: Place) -> tuple[Tensor, float]:
    """The loss's gradient with regard to the tokens of the only image's patches `[patches, width]`, float32, where they enter or
    leave the projector, and the loss. A class token is left out."""
    whole, kept = model.whole, list[Tensor]()
    hook = (
        whole.projector.register_forward_pre_hook(lambda _module, inputs: kept.append(inputs[0]))
        if at == "input"
        else whole.projector.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    )
    try:
        loss = mean_loss(model, batch, objective)
    finally:
        hook.remove()
    (tokens,) = kept
    (gradient,) = torch.autograd.grad(loss, [tokens])
    first = int(model.arch.encoder.class_token)
    return gradient[first : first + batch.views[0].tokens, 0].float(), float(loss.detach())
