"""One optimizer step: reference log-probs, forward and backward through megatron-core's schedule, update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from pivot_megatron.data.batch import PackedBatch
from pivot_megatron.objective.types import AnswerLogprobs, Objective
from pivot_megatron.runtime.device import current_platform
from pivot_megatron.runtime.distributed import is_last_stage, sum_over_loss_ranks
from pivot_megatron.train.optimizer import Optimization


@dataclass(frozen=True)
class StepResult:
    """`loss` is the mean over the global count; `metrics` likewise. `applied` is false where megatron-core skipped it."""

    loss: float
    grad_norm: float
    learning_rate: float
    count: int
    metrics: dict[str, float]
    applied: bool


def _schedule(
    model: torch.nn.Module,
    step: Callable[[Iterator[PackedBatch], Any], Any],
    micro_batches: Sequence[PackedBatch],
    **options: Any,
) -> list[Any]:
    collected: list[Any] = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(micro_batches),
        model=[model],
        num_microbatches=len(micro_batches),
        seq_length=1,  # stages tell each other their true lengths
        micro_batch_size=1,
        **options,
    )
    return collected


def _keep_logprobs(logprobs: Tensor, non_loss_data: bool = False) -> Tensor:
    return logprobs.detach()


def forward_logprobs(model: torch.nn.Module, batches: Sequence[PackedBatch]) -> list[Tensor | None]:
    """Log-probs `[N]` of each micro-batch's answer tokens, forward only; None on stages that are not the last."""

    def step(iterator: Iterator[PackedBatch], stage: torch.nn.Module) -> tuple[Tensor, Any]:
        return stage(next(iterator).to(current_platform().device)), _keep_logprobs

    with torch.no_grad():
        found = _schedule(model, step, batches, forward_only=True, collect_non_loss_data=True)
    return list(found) if is_last_stage() else [None] * len(batches)


def _loss(objective: Objective, batch: PackedBatch, logprobs: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    result = objective(AnswerLogprobs(logprobs, batch.branch, batch.branches, batch.reference))
    counted = torch.tensor(result.count, dtype=torch.int, device=logprobs.device)
    return result.total, counted, {"loss": result.total.detach(), "count": counted, **result.metrics}


def observed(objective: Objective, result: StepResult) -> Objective:
    """`objective` after a step, the same on every rank; unmoved where the step was not applied."""
    return objective.observed(result.metrics, result.count) if result.applied else objective


def train_step(
    wrapped: DistributedDataParallel,
    optimization: Optimization,
    objective: Objective,
    batches: Sequence[PackedBatch],
    reference: torch.nn.Module | None,
) -> StepResult:
    """`batches`: this data-parallel rank's micro-batches of the global batch, on the host.

    `reference`: a frozen model, where batches do not bring its log-probs themselves.
    """
    if reference is not None:
        known = forward_logprobs(reference, batches)
        batches = [replace(batch, reference=logps) for batch, logps in zip(batches, known, strict=True)]
    wrapped.zero_grad_buffer()
    optimization.optimizer.zero_grad()

    def step(iterator: Iterator[PackedBatch], stage: torch.nn.Module) -> tuple[Tensor, Any]:
        batch = next(iterator).to(current_platform().device)
        return stage(batch), partial(_loss, objective, batch)

    losses = _schedule(wrapped, step, batches, forward_only=False)
    learning_rate = optimization.learning_rate()
    applied, grad_norm, _ = optimization.optimizer.step()
    optimization.scheduler.step(increment=1)
    names = ("loss", "count", *objective.metric_names)
    sums = sum_over_loss_ranks({name: sum(float(loss[name]) for loss in losses) for name in names})
    count = int(sums.pop("count"))
    means = {name: value / max(count, 1) for name, value in sums.items()}
    return StepResult(means.pop("loss"), float(grad_norm), learning_rate, count, means, bool(applied))
