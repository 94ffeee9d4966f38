"""LayerScale (Touvron et al. 2021): a residual branch's output times a learned scale a channel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Add = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]


class LayerScale(torch.nn.Module):
    """Stands where a megatron-core layer has its bias-dropout-add, and is called the same way."""

    def __init__(self, width: int, dtype: torch.dtype, sequence_parallel: bool) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(width, dtype=dtype))
        # Each rank scales its part of the sequence, so gradients are partial sums.
        self.scale.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, training: bool, fused: bool) -> Add:
        def add(output_and_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            output, bias = output_and_bias
            return torch.addcmul(residual, output if bias is None else output + bias, self.scale)

        return add
