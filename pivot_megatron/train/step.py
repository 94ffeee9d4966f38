"""One optimizer step: reference log-probs, forward and backward through megatron-core's schedule, update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import tee
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from pivot_megatron.data.batch import PackedBatch
from pivot_megatron.model.composition import Stage
from pivot_megatron.objective.types import AnswerLogprobs, Objective
from pivot_megatron.runtime.copies import on_device
from pivot_megatron.runtime.device import current_platform
from pivot_megatron.runtime.distributed import computes_loss, is_last_stage, sum_over_ranks
from pivot_megatron.train.guard import not_finite
from pivot_megatron.train.optimizer import Optimization

NO_ANSWERS = "no answer in it counts"

Judge = Callable[[float, float], str | None]
"""Of a step's loss and gradient norm, why it is not to be applied; None where it is."""


@dataclass(frozen=True)
class Worst:
    """The samples of this rank's micro-batches that a step's trouble is looked for in: those whose log-probs are not finite, or
    else all of the micro-batch with the highest mean loss. `loss` is that micro-batch's."""

    loss: float
    keys: tuple[str, ...]


@dataclass(frozen=True)
class StepResult:
    """`loss` is the mean over the global count; `metrics` likewise. `tally`: sums over all ranks of what each one told.

    Where the step was not applied, `refused` says why, and `worst` is there on ranks that compute a loss.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    count: int
    metrics: dict[str, float]
    applied: bool
    tally: Mapping[str, float] = field(default_factory=dict)
    refused: str | None = None
    worst: Worst | None = None


def _schedule(
    chunks: Iterable[torch.nn.Module],
    step: Callable[[Iterator[PackedBatch], Any], Any],
    micro_batches: Sequence[PackedBatch],
    **options: Any,
) -> list[Any]:
    chunks = list(chunks)
    for chunk in chunks:
        # megatron-core's schedules do so where the language model is in FP8; an encoder alone would keep old weights.
        model: Any = getattr(chunk, "module", chunk)
        model.set_is_first_microbatch()
    # Each chunk of a virtual pipeline sees every micro-batch, which comes to the device once.
    iterators = tee(on_device(micro_batches, current_platform()), len(chunks))
    collected: list[Any] = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=list(iterators),
        model=chunks,
        num_microbatches=len(micro_batches),
        seq_length=1,  # stages tell each other their true lengths
        micro_batch_size=1,
        **options,
    )
    return collected


def _keep_logprobs(logprobs: Tensor, non_loss_data: bool = False) -> Tensor:
    return logprobs.detach()


def forward_logprobs(chunks: Iterable[torch.nn.Module], batches: Sequence[PackedBatch]) -> list[Tensor | None]:
    """Log-probs `[N]` of each micro-batch's answer tokens, forward only; None on stages that are not the last."""

    def step(iterator: Iterator[PackedBatch], stage: torch.nn.Module) -> tuple[Tensor, Any]:
        return stage(next(iterator)), _keep_logprobs

    with torch.no_grad():
        found = _schedule(chunks, step, batches, forward_only=True, collect_non_loss_data=True)
    return list(found) if is_last_stage() else [None] * len(batches)


def _loss(objective: Objective, batch: PackedBatch, logprobs: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    result = objective(AnswerLogprobs(logprobs, batch.branch, batch.branches, batch.reference))
    counted = torch.tensor(result.count, dtype=torch.int, device=logprobs.device)
    told = {"loss": result.total.detach(), "count": counted, **result.metrics, "logprobs": logprobs.detach()}
    return result.total, counted, told


def observed(objective: Objective, result: StepResult) -> Objective:
    """`objective` after a step, the same on every rank; unmoved where the step was not applied."""
    return objective.observed(result.metrics, result.count) if result.applied else objective


def train_step(
    wrapped: Sequence[DistributedDataParallel],
    optimization: Optimization,
    objective: Objective,
    batches: Sequence[PackedBatch],
    reference: Stage | None,
    judge: Judge = not_finite,
    tally: Callable[[], Mapping[str, float]] = dict,
) -> StepResult:
    """`batches`: this data-parallel rank's micro-batches of the global batch, on the host.

    `reference`: a frozen model, where batches do not bring its log-probs themselves. `tally`: asked once the backward pass is
    through for numbers of this rank, to be summed over all ranks beside the losses, by the same names on every rank.
    """
    if reference is not None:
        known = forward_logprobs(reference, batches)
        batches = [replace(batch, reference=logps) for batch, logps in zip(batches, known, strict=True)]
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    optimization.optimizer.zero_grad()

    def step(iterator: Iterator[PackedBatch], stage: torch.nn.Module) -> tuple[Tensor, Any]:
        batch = next(iterator)
        return stage(batch), partial(_loss, objective, batch)

    losses = _schedule(wrapped, step, batches, forward_only=False)
    names = ("loss", "count", *objective.metric_names)
    sums = {name: sum(float(loss[name]) for loss in losses) if computes_loss() else 0.0 for name in names}
    own = tally()
    sums = sum_over_ranks({**sums, **own})
    count = int(sums["count"])
    means = {name: sums[name] / max(count, 1) for name in names if name != "count"}
    loss = means.pop("loss")
    learning_rate = optimization.learning_rate()
    grad_norm, refused = optimization.update(lambda norm: judge(loss, norm) if count else NO_ANSWERS)
    told = {name: sums[name] for name in own}
    worst = _worst(batches, losses) if refused and computes_loss() else None
    return StepResult(loss, grad_norm, learning_rate, count, means, not refused, told, refused, worst)


def _worst(batches: Sequence[PackedBatch], losses: Sequence[Mapping[str, Tensor]]) -> Worst | None:
    """Over the batches that have samples; NaN is above every number."""
    ranked = [
        (float(loss["loss"]) / max(int(loss["count"]), 1), batch, loss["logprobs"])
        for batch, loss in zip(batches, losses, strict=True)
        if batch.samples
    ]
    if not ranked:
        return None
    mean, worst, _ = max(ranked, key=lambda one: (not math.isfinite(one[0]), one[0]))
    broken = {
        batch.keys[branch // batch.branches_per_sample]: None
        for _, batch, logprobs in ranked
        for branch in batch.branch[~_finite(logprobs, batch).cpu()].tolist()
    }
    return Worst(mean, tuple(broken) or worst.keys)


def _finite(logprobs: Tensor, batch: PackedBatch) -> Tensor:
    """`[N]`: where the model's log-prob, and the reference's, is."""
    finite = logprobs.isfinite()
    return finite if batch.reference is None else finite & batch.reference.to(finite.device).isfinite()
