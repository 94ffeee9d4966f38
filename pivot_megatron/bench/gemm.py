"""What this machine multiplies matrices at, now."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

import torch

from pivot_megatron.runtime.device import current_platform, device_count, wait_for

_CPU_SIZE = 1536  # three matrices of this size lie within the caches of a server's core or two
_GPU_SIZE = 8192  # past which the rate of bf16 products grows no more
_SECONDS = 0.15


def gemm_rate() -> float:
    """FLOP/s of float32 products of two square matrices on all of this process's CPU threads: the mean of a moment's, so that
    whatever shares the machine shows."""
    return _rate(torch.device("cpu"), torch.float32, _CPU_SIZE)


def device_rate(dtype: torch.dtype) -> float:
    """FLOP/s of large square products in `dtype` on what this process computes on."""
    device = current_platform().device
    return _rate(device, dtype, _CPU_SIZE if device.type == "cpu" else _GPU_SIZE)


def machine_rate(processes: int) -> float:
    """FLOP/s of all that a run of `processes` on this machine computes on: its CPU cores in float32, or as many GPUs in bf16.

    One GPU is measured for all, by a process that ends with it: its context would take memory of what runs next.
    """
    if not device_count():
        return gemm_rate()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return processes * pool.submit(_gpu_rate).result()


def _gpu_rate() -> float:
    return device_rate(torch.bfloat16)


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
