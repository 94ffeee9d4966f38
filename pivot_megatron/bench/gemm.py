"""What this machine multiplies matrices at, now."""

from __future__ import annotations

import time

import torch

_SIZE = 1536  # three matrices of this size lie within the caches of a server's core or two
_SECONDS = 0.15


def gemm_rate() -> float:
    """FLOP/s of float32 products of two square matrices on all of this process's CPU threads: the mean of a moment's, so that
    whatever shares the machine shows."""
    a, b = torch.randn(_SIZE, _SIZE), torch.randn(_SIZE, _SIZE)
    out = torch.mm(a, b)
    began, products = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < _SECONDS:
        torch.mm(a, b, out=out)
        products += 1
    return 2.0 * _SIZE**3 * products / passed
