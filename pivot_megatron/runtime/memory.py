"""The most memory that this process, or another, has taken."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from pivot_megatron.runtime.device import current_platform


def peak_memory() -> int:
    """Bytes of this process so far: its tensors' on the GPU, as torch counts them, or where it has none its resident memory."""
    if current_platform().is_cuda:
        return int(torch.cuda.max_memory_allocated())
    return peak_resident(os.getpid())


def peak_resident(process: int) -> int:
    """Highest resident memory of a process so far, bytes; 0 where it has ended.

    The kernel's own mark of the process's memory. `getrusage` would not do: there a child begins with its parent's peak.
    """
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(found[0]) * 1024 if found else 0
