"""SwiGLU (Shazeer 2020) as one operation that keeps its input alone for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu


class SwiGlu(torch.nn.Module):
    """`[..., 2 f]`, gate beside value, to `[..., f]`. Written out in torch's operations it would keep four tensors as wide."""

    def __init__(self, config: object) -> None:
        """`config` is what megatron-core builds an activation with."""
        super().__init__()

    def forward(self, gate_and_value: Tensor) -> Tensor:
        out: Tensor = _SwiGlu.apply(gate_and_value)
        return out

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Nothing: megatron-core asks every part of an MLP for its part of a checkpoint."""
        return {}


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        gate, value = both.chunk(2, -1)
        return silu(gate).mul_(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (both,) = ctx.saved_tensors
        gate, value = both.chunk(2, -1)
        out = torch.empty_like(both)
        to_gate, to_value = out.chunk(2, -1)
        torch.mul(silu(gate), gradient, out=to_value)
        torch.ops.aten.silu_backward.grad_input(gradient * value, gate, grad_input=to_gate)
        return out
