"""Classes that a transformer layer is made of on this platform: megatron-core's local ones, or Transformer Engine's."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig

from pivot_megatron.runtime.device import current_platform
from pivot_megatron.runtime.norm import RmsNorm


class LocalNorm:
    """LayerNorm or RMSNorm by `config.normalization`, usable under sequence parallelism.

    Each rank normalises its part of the sequence, so its parameters' gradients are partial sums: the `sequence_parallel`
    mark makes megatron-core add them up over the tensor-parallel group. Its own torch norm refuses sequence parallelism.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> torch.nn.Module:  # type: ignore[misc]
        kinds = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": RmsNorm}
        norm: torch.nn.Module = kinds[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


@dataclass(frozen=True)
class LayerModules:
    """`norm_linear` is a column-parallel linear with the norm before it fused in, or None; then `norm` stands alone."""

    column_linear: type
    row_linear: type
    norm: type
    norm_linear: type | None

    @property
    def separate_norm(self) -> type:
        """The class in a layer's own norm slots: nothing where the norm is fused into the next linear."""
        return IdentityOp if self.norm_linear else self.norm

    @property
    def first_linear(self) -> type:
        return self.norm_linear or self.column_linear


GradientAccumulation = Literal["te", "apex", "separate"]
_FUSION_SWITCHES: dict[GradientAccumulation, tuple[str, ...]] = {
    "te": ("fuse_wgrad_accumulation",),
    "apex": ("gradient_accumulation_fusion",),
    "separate": (),
}


def gradient_accumulation() -> GradientAccumulation:
    """By whose kernel a linear layer's weight gradient is added to the data-parallel buffer."""
    if current_platform().transformer_engine:
        return "te"
    fused = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    return "apex" if fused and current_platform().is_cuda else "separate"


def fuse_gradient_accumulation(model: torch.nn.Module) -> None:
    """Let the product that is a weight's gradient add itself to the data-parallel buffer, where this machine has such a product
    and the weight such a buffer (`main_grad`): weights that are frozen, or in no data-parallel wrapper, are left as they are.

    megatron-core's switch is one for all layers, and would ask apex's kernel of the output layer too, which needs none.
    """
    for switch in _FUSION_SWITCHES[gradient_accumulation()]:
        for module in model.modules():
            if hasattr(module, switch) and hasattr(getattr(module, "weight", None), "main_grad"):
                setattr(module, switch, True)


def layer_modules() -> LayerModules:
    if not current_platform().transformer_engine:
        return LayerModules(ColumnParallelLinear, RowParallelLinear, LocalNorm, None)
    from megatron.core.extensions import transformer_engine as te

    return LayerModules(
        te.TEColumnParallelLinear, te.TERowParallelLinear, te.TENorm, te.TELayerNormColumnParallelLinear
    )
