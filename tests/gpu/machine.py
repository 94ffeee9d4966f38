"""The device that the GPU check runs on: time, memory, what it multiplies at."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from pivot_megatron.runtime.device import current_platform


def wait() -> None:
    """Until all queued work is done."""
    if current_platform().is_cuda:
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any], warm_up: int, repeats: int) -> float:
    """The median of `repeats` runs, each waited for, after `warm_up` that are not counted."""
    taken = []
    for _ in range(warm_up + repeats):
        wait()
        began = time.perf_counter()
        work()
        wait()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[warm_up:])


def forget_peak() -> None:
    if current_platform().is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    """Most memory that tensors took since `forget_peak`; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if current_platform().is_cuda else 0.0


def product_rate(size: int) -> float:
    """FLOP/s of bf16 products of two square matrices, ten in a row."""
    device = current_platform().device
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))

    def ten() -> None:
        for _ in range(10):
            a @ b

    return 10 * 2.0 * size**3 / seconds(ten, warm_up=2, repeats=5)


def without_transformer_engine() -> None:
    """From here on, this process builds megatron-core's own layers."""
    from unittest import mock

    from pivot_megatron.runtime import device

    device.current_platform.cache_clear()
    with mock.patch.object(device.importlib.util, "find_spec", lambda _: None):
        device.current_platform()
