"""Whose kernels a run computes with on this machine: decided in this room alone, and told in words."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pivot_megatron.config.schema import Precision
from pivot_megatron.runtime.attention import DESCRIPTIONS, Choice, choose_kernel
from pivot_megatron.runtime.device import current_platform
from pivot_megatron.runtime.engine import engine_fault
from pivot_megatron.runtime.layers import GradientAccumulation, gradient_accumulation

_ACCUMULATION: Mapping[GradientAccumulation, str] = {
    "te": "in Transformer Engine's weight-gradient products",
    "apex": "in apex's weight-gradient products",
    "separate": "apart from the weight-gradient products",
}


@dataclass(frozen=True)
class Kernels:
    """`gradient_accumulation`: where weight gradients are added to the data-parallel buffer. `passed_over`: what is installed,
    would be faster, and is of no use here, each with the reason."""

    layers: str
    attention: str
    fp8: str
    optimizer: str
    gradient_accumulation: str
    passed_over: tuple[str, ...] = ()


def kernels_in_use(precision: Precision) -> Kernels:
    """Raises UserError where this machine has none for `precision`."""
    attention = choose_kernel(torch.bfloat16 if precision.compute == "bf16" else torch.float32)
    return Kernels(
        layers="Transformer Engine's" if current_platform().transformer_engine else "megatron-core's own",
        attention=DESCRIPTIONS[attention.name],
        fp8=_fp8(precision),
        optimizer=_optimizer(),
        gradient_accumulation=_ACCUMULATION[gradient_accumulation()],
        passed_over=_passed_over(attention),
    )


def _passed_over(attention: Choice) -> tuple[str, ...]:
    """Transformer Engine's layers and optimizer go with it, also where its attention is not asked for."""
    fault = engine_fault() if current_platform().is_cuda else None
    engine = [f"Transformer Engine does not load ({fault})"] if fault else []
    others = [
        f"{DESCRIPTIONS[name]} does not load ({why})" for name, why in attention.passed_over.items() if name != "te"
    ]
    return (*engine, *others)


def _fp8(precision: Precision) -> str:
    parts = [part for part in ("encoder", "llm") if precision.fp8_of(part)]  # type: ignore[arg-type]
    return f"{precision.fp8.recipe}: {' and '.join(parts)}" if precision.fp8 and parts else "none"


def _optimizer() -> str:
    """What megatron-core found for Adam, or was given."""
    package = importlib.import_module("megatron.core.optimizer").Adam.__module__.partition(".")[0]
    known = {"transformer_engine": "Transformer Engine's FusedAdam", "apex": "apex's FusedAdam"}
    return known.get(package, "torch's fused AdamW, its step kept by group")
