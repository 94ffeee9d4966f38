"""Rotary position embeddings at given positions, keeping nothing but their table for the backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """`cosine`, `sine` `[T, 1, d / 2]`: by which angle each token's pairs of channels (i, i + d / 2) are turned."""

    cosine: Tensor
    sine: Tensor

    @classmethod
    def at(cls, angles: Tensor, dtype: torch.dtype) -> Rotation:
        """`angles` `[T, 1, 1, d]`, megatron-core's table at each token's position, whose two halves are alike."""
        half = angles[:, 0, :, : angles.shape[-1] // 2]
        return cls(half.cos().to(dtype), half.sin().to(dtype))

    def __call__(self, x: Tensor) -> Tensor:
        """`[T, heads, d]`, turned."""
        out: Tensor = _Turned.apply(x, self.cosine, self.sine)
        return out


class _Turned(torch.autograd.Function):
    """A rotation's gradient is the rotation back, so neither input nor products are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _turn(x, cosine, sine)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cosine, sine = ctx.saved_tensors
        return _turn(gradient, cosine, -sine), None, None


def _turn(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    half = first.shape[-1]
    torch.mul(first, cosine, out=out[..., :half]).addcmul_(second, sine, value=-1)
    torch.mul(second, cosine, out=out[..., half:]).addcmul_(first, sine)
    return out
