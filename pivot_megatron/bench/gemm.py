"""What this machine multiplies matrices at, now."""

from __future__ import annotations

import time

import torch

from pivot_megatron.runtime.device import current_platform, wait_for

_CPU_SIZE = 1536  # three matrices of this size lie within the caches of a server's core or two
_GPU_SIZE = 8192  # past which the rate of bf16 products grows no more
_SECONDS = 0.15


def device_rate(dtype: torch.dtype) -> float:
    """FLOP/s of large square products in `dtype` on what this process computes on, a CPU's with all of its threads: the mean of a
    moment's, so that whatever shares the machine shows."""
    device = current_platform().device
    return _rate(device, dtype, _CPU_SIZE if device.type == "cpu" else _GPU_SIZE)


def _rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.mm(a, b)
    wait_for(device)
    began, products = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < _SECONDS:
        torch.mm(a, b, out=out)
        wait_for(device)
        products += 1
    return 2.0 * size**3 * products / passed
