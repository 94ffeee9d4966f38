"""megatron-core's data-parallel wrapper, distributed optimizer and schedule, from a run's config."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from pivot_megatron.config.schema import Layout, ParameterRule, RunConfig
from pivot_megatron.convert.load import parameters_by_global_name
from pivot_megatron.convert.plan import rows_by_parameter
from pivot_megatron.model.composition import VisionLanguageModel
from pivot_megatron.model.freeze import rate_of, require_matches


def apply_rules(model: VisionLanguageModel, rules: Sequence[ParameterRule]) -> None:
    """Freeze what the rules freeze and mark every other parameter with its learning-rate factor.

    Before the data-parallel wrap, which gives buffers only to what trains. Names are global, so every stage agrees.
    """
    require_matches(list(rows_by_parameter(model.arch)), rules)
    for name, parameter in parameters_by_global_name(model):
        rate = rate_of(name, rules)
        parameter.requires_grad = rate != "frozen" and not getattr(parameter, "is_constant", False)
        parameter.learning_rate_factor = 1.0 if rate == "frozen" else rate  # type: ignore[attr-defined]


def wrap(model: VisionLanguageModel, layout: Layout) -> DistributedDataParallel:
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
    _count_padding_as_content(wrapped)
    model.config.finalize_model_grads_func = finalize_model_grads
    if layout.overlap_gradient_reduce:
        model.config.no_sync_func = wrapped.no_sync
    return wrapped


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


def build_optimization(wrapped: DistributedDataParallel, config: RunConfig, steps: int) -> Optimization:
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
    optimizer = get_megatron_optimizer(settings, [wrapped], config_overrides=_overrides(settings, config.parameters))
    wrapped.config.grad_scale_func = optimizer.scale_loss
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
