"""Several processes on this machine, without a launcher typed by hand."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from pivot_megatron.config.schema import Layout
from pivot_megatron.runtime.device import device_count


def default_processes(layout: Layout) -> int:
    """One a GPU; on a machine without, as many as the layout's tensor and pipeline sizes need."""
    return device_count() or layout.model_parallel_size


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run `pivot ARGUMENTS` in `processes` processes through torchrun; returns its exit code.

    Ctrl-C reaches the processes from the terminal; this one waits until they have gone.
    """
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        "-m",
        "pivot_megatron.cli",
        *arguments,
    ]
    # torchrun would warn on every start that it set this itself; each process shares out the cores later.
    child = subprocess.Popen(command, env={"OMP_NUM_THREADS": "1", **os.environ})
    try:
        return child.wait()
    except KeyboardInterrupt:
        try:
            return child.wait(timeout=30)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            raise
