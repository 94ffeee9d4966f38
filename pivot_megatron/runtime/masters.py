"""The float32 numbers behind 16-bit weights that train: megatron-core's distributed optimizer keeps them, each data-parallel rank
a share of every parameter's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def note_masters(optimizer: Any) -> None:
    """Have each parameter know where the share of its master lies that is on this rank. `optimizer`: megatron-core's."""
    for part in optimizer.chained_optimizers:
        for parameter in [] if part.is_stub_optimizer else part.model_param_gbuf_map:
            parameter.master_range = part._get_model_param_range_map(parameter)["param"]


def holds_in_full(parameter: Tensor) -> bool:
    """Whether float32 numbers are not rounded as `set_weight` sets them, on this rank or another."""
    return parameter.dtype is torch.float32 or hasattr(parameter, "main_param")


@torch.no_grad()
def set_weight(parameter: Tensor, value: Tensor) -> None:
    """Set `parameter`, in its own dtype, and this rank's share of its master, unrounded. `value`: of its shape."""
    parameter.copy_(value)
    master = getattr(parameter, "main_param", None)
    if master is not None:
        share = parameter.master_range  # type: ignore[attr-defined]
        master.copy_(value.reshape(-1)[share.start : share.end])
