"""Classes that a transformer layer is made of on this platform: megatron-core's local ones, or Transformer Engine's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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


def layer_modules() -> LayerModules:
    if not current_platform().transformer_engine:
        return LayerModules(ColumnParallelLinear, RowParallelLinear, LocalNorm, None)
    from megatron.core.extensions import transformer_engine as te

    return LayerModules(
        te.TEColumnParallelLinear, te.TERowParallelLinear, te.TENorm, te.TELayerNormColumnParallelLinear
    )
