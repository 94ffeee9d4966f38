"""What this machine multiplies matrices at, at best."""

from __future__ import annotations

import time

import torch

_SIZE = 1536  # three matrices of this size lie within the caches of a server's core or two
_SECONDS = 1.0


def gemm_peak() -> float:
    """FLOP/s of a float32 product of two square matrices on all of this process's CPU threads: the best of a second's tries,
    for whatever disturbs one only slows it."""
    a, b = torch.randn(_SIZE, _SIZE), torch.randn(_SIZE, _SIZE)
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while (began := time.perf_counter()) < end:
        torch.mm(a, b)
        best = min(best, time.perf_counter() - began)
    return 2.0 * _SIZE**3 / best
