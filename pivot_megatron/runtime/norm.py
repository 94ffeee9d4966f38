"""RMSNorm (Zhang & Sennrich 2019) as one operation that keeps its input and one number a row for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RmsNorm(torch.nn.Module):
    """Over the last dimension, computed in float32. torch's own falls apart into operations that keep three tensors more."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _RmsNorm.apply(x, self.weight, self.eps)
        return out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
        inverse = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        # As Qwen2 has it: rounded to x's type before the weight comes in.
        out: Tensor = (x * inverse).to(x.dtype) * weight
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight, inverse = ctx.saved_tensors
        normed = x * inverse  # float32, as everything until the ends
        to_weight = (gradient * normed).flatten(0, -2).sum(0)
        weighted = (gradient * weight).float()
        mean = (weighted * normed).mean(-1, keepdim=True)
        to_x = torch.addcmul(weighted, normed, mean, value=-1).mul_(inverse)
        return to_x.to(x.dtype), to_weight.to(weight.dtype), None
