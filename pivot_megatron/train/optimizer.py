"""megatron-core's data-parallel wrapper, distributed optimizer and schedule, from a run's config."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from pivot_megatron.config.schema import Layout, ParameterRule, RunConfig
from pivot_megatron.convert.load import parameters_by_global_name
from pivot_megatron.convert.plan import rows_by_parameter
from pivot_megatron.model.composition import Stage, VisionLanguageModel
from pivot_megatron.model.freeze import rate_of, require_matches
from pivot_megatron.runtime.layers import fuse_gradient_accumulation
from pivot_megatron.runtime.masters import note_masters


def apply_rules(model: Stage, rules: Sequence[ParameterRule]) -> None:
    """Freeze what the rules freeze and mark every other parameter with its learning-rate factor.

    Before the data-parallel wrap, which gives buffers only to what trains. Names are global, so every stage agrees.
    """
    require_matches(list(rows_by_parameter(model.arch)), rules)
    for name, parameter in parameters_by_global_name(model):
        rate = rate_of(name, rules)
        parameter.requires_grad = rate != "frozen" and not getattr(parameter, "is_constant", False)
        parameter.learning_rate_factor = 1.0 if rate == "frozen" else rate  # type: ignore[attr-defined]


def wrap(stage: Stage, layout: Layout) -> list[DistributedDataParallel]:
    """Each of the stage's chunks."""
    wrapped = [_wrapped(chunk, layout) for chunk in stage]
    if layout.overlap_gradient_reduce:
        waits = [chunk.no_sync for chunk in wrapped]
        for chunk in stage:
            chunk.config.no_sync_func = waits[0] if len(waits) == 1 else waits
    return wrapped


def _wrapped(model: VisionLanguageModel, layout: Layout) -> DistributedDataParallel:
    config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        overlap_grad_reduce=layout.overlap_gradient_reduce,
        overlap_param_gather=layout.overlap_parameter_gather,
        bucket_size=layout.overlap_bucket_size,
        grad_reduce_in_fp32=True,
    )
    for parameter in model.parameters():
        parameter.gradient_must_appear = layout.overlap_gradient_reduce  # type: ignore[attr-defined]
    wrapped = DistributedDataParallel(model.config, config, model)
    fuse_gradient_accumulation(wrapped)
    _count_padding_as_content(wrapped)
    model.config.finalize_model_grads_func = finalize_model_grads
    return wrapped


def before_reduction(wrapped: Sequence[DistributedDataParallel], call: Callable[[], None]) -> None:
    """Have `call` called in each step when the backward pass is through and gradients are about to be put together."""
    config = wrapped[0].config  # the first chunk's is the one that schedules ask

    def finalize(*args: Any, **kwargs: Any) -> None:
        call()
        finalize_model_grads(*args, **kwargs)

    config.finalize_model_grads_func = finalize


def _count_padding_as_content(wrapped: DistributedDataParallel) -> None:
    """A fully reshardable save leaves the padding between a buffer's buckets out of the world tensors and then cuts them by
    offsets that count it, so everything past the first padding is shifted. With the padding counted as content both agree.
    Before the optimizer is built, which copies these numbers.
    """
    for buffer in (*wrapped.buffers, *wrapped.expert_parallel_buffers):
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()
        buffer.numel_unpadded = buffer.numel


def _overrides(config: OptimizerConfig, rules: Sequence[ParameterRule]) -> dict[Any, Any]:
    """No weight decay on vectors, and each factor's own learning rate."""
    overrides = get_standard_config_overrides(config)
    for rate in sorted({rule.rate for rule in rules if rule.rate != "frozen" and rule.rate != 1.0}):

        def has_rate(parameter: torch.nn.Parameter, rate: float = rate) -> bool:
            return getattr(parameter, "learning_rate_factor", 1.0) == rate

        key = ParamKey(predicate=ParamPredicate(name=f"learning_rate_factor_{rate}", fn=has_rate))
        overrides[key] = {"max_lr": config.lr * rate, "min_lr": config.min_lr * rate}
    return dict(overrides)


@dataclass(frozen=True)
class Optimization:
    """`optimizer` and `scheduler` are megatron-core's."""

    optimizer: Any
    scheduler: OptimizerParamScheduler

    def learning_rate(self) -> float:
        """Of parameters with factor 1, as the next step will use it."""
        rates = [group["lr"] for group in self.optimizer.param_groups if group.get("default_config", True)]
        return float(max(rates or [group["lr"] for group in self.optimizer.param_groups]))

    def update(self, judge: Callable[[float], str | None]) -> tuple[float, str | None]:
        """Apply the gradients, unless `judge` has a reason against their norm, the whole one before clipping, and move the
        schedule on. Returns the norm and the reason; where there is one, nothing has moved.

        megatron-core's own step takes the norm in the same pass, but gives nobody a say in between, and without a loss
        scale, which bf16 and fp32 have none of, it applies a gradient that is not finite. Collective over all ranks.
        """
        overflow = self.optimizer.prepare_grads()
        norm = self.optimizer.get_grad_norm()
        reason = "a gradient overflowed" if overflow else judge(float(norm))
        if reason is None:
            self._clip(norm)
            self.optimizer.step_with_ready_grads()
            self.scheduler.step(increment=1)
        return float(norm), reason

    def _clip(self, norm: Any) -> None:
        """`norm`: of the whole gradient, as the optimizer gives it, a number or a tensor."""
        for optimizer in self.optimizer.chained_optimizers:
            parameters = [] if optimizer.is_stub_optimizer else optimizer.get_parameters()
            if parameters and optimizer.config.clip_grad > 0.0:
                clip_grad_by_total_norm_fp32(parameters, max_norm=optimizer.config.clip_grad, total_norm=norm)


def build_optimization(wrapped: Sequence[DistributedDataParallel], config: RunConfig, steps: int) -> Optimization:
    wanted = config.optimizer
    bf16 = config.precision.compute == "bf16"
    settings = OptimizerConfig(
        optimizer="adam",
        lr=wanted.learning_rate,
        min_lr=wanted.minimum_learning_rate,
        weight_decay=wanted.weight_decay,
        adam_beta1=wanted.beta1,
        adam_beta2=wanted.beta2,
        adam_eps=wanted.epsilon,
        clip_grad=wanted.clip_gradient,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=True,
        overlap_param_gather=config.layout.overlap_parameter_gather,
    )
    optimizer = get_megatron_optimizer(
        settings, list(wrapped), config_overrides=_overrides(settings, config.parameters)
    )
    note_masters(optimizer)
    for chunk in wrapped:
        chunk.config.grad_scale_func = optimizer.scale_loss
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=wanted.learning_rate,
        min_lr=wanted.minimum_learning_rate,
        lr_warmup_steps=min(math.ceil(wanted.warmup_fraction * steps), steps - 1),
        lr_decay_steps=steps,
        lr_decay_style=wanted.schedule,
        start_wd=wanted.weight_decay,
        end_wd=wanted.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=True,
        override_opt_param_scheduler=False,
    )
    return Optimization(optimizer, scheduler)
