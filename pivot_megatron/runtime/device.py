"""Which device, backend and layer classes this machine offers."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import psutil
import torch

from pivot_megatron.runtime.engine import engine_fault


@dataclass(frozen=True)
class Platform:
    """`backend` is torch.distributed's name; `transformer_engine` says that TE layers can be built here.

    `logits_tile_bytes`: how much of the logits stands in memory at once; on a CPU, what its cores' own caches hold.
    """

    device: torch.device
    backend: str
    transformer_engine: bool
    logits_tile_bytes: int

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"


@cache
def current_platform() -> Platform:
    if not torch.cuda.is_available():
        return Platform(torch.device("cpu"), "gloo", transformer_engine=False, logits_tile_bytes=1 << 20)
    index = int(os.environ.get("LOCAL_RANK", "0"))
    torch.cuda.set_device(index)
    has_te = engine_fault() is None and importlib.util.find_spec("transformer_engine") is not None
    return Platform(torch.device("cuda", index), "nccl", has_te, logits_tile_bytes=256 << 20)


def device_count() -> int:
    """GPUs of this machine, 0 on a CPU machine."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def device_name() -> str | None:
    """Of this process's GPU, None on a CPU machine."""
    return torch.cuda.get_device_name() if current_platform().is_cuda else None


def device_memory() -> tuple[float, float]:
    """(all, taken) bytes: of this process's GPU, whoever took them, or of the machine and by this process."""
    if current_platform().is_cuda:
        free, whole = torch.cuda.mem_get_info()
        return float(whole), float(whole - free)
    return float(psutil.virtual_memory().total), float(psutil.Process().memory_info().rss)


def wait_for(device: torch.device) -> None:
    """Until all work that is queued on `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def beside_training(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Makes contexts, in any thread, whose work on `device` waits for none that training has queued there."""
    if device.type != "cuda":
        return nullcontext
    return partial(torch.cuda.stream, torch.cuda.Stream(device))


def available_cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_threads(wanted: int | None) -> None:
    """Where the model runs on CPU: `wanted` threads, or this process's share of the cores (torch's default is all of them for
    each process)."""
    if not current_platform().is_cuda:
        torch.set_num_threads(wanted or max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
