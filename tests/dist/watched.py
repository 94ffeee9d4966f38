"""A process of a job under watch: `python -m tests.dist.watched FOLDER HOW`. Rank 1 of it blocks, fails, or does as the others."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pivot_megatron.runtime  # noqa: F401  (before megatron.core)
import torch
import torch.distributed as dist

from pivot_megatron.config.schema import Layout
from pivot_megatron.errors import RunError
from pivot_megatron.runtime.distributed import process_groups
from pivot_megatron.runtime.watch import Patience, Watch

SILENCE, STEP = 3.0, 4.0  # seconds
PATIENCE = Patience(silence=SILENCE, step=STEP, files=60.0)
STEPS = 100


def work(how: str) -> None:
    for step in range(1, STEPS + 1):
        watch.at("waiting for data", step)
        if dist.get_rank() == 1 and step == 3:
            if how == "block":
                time.sleep(600)
            if how == "fail":
                raise RunError("sample 007 is broken")
            if how == "slow":
                watch.at("saving", step, files=True)
                time.sleep(2 * STEP)
        elif step == 3 and how == "slow":
            watch.at("saving", step, files=True)
        watch.at("forward and backward", step)
        dist.all_reduce(torch.ones(4))
        time.sleep(0.05)
        if how == "all" and step == 3:
            time.sleep(600)
        print(f"step {step}", flush=True)


if __name__ == "__main__":
    with process_groups(Layout(), 1, PATIENCE.timeout), Watch(PATIENCE, Path(sys.argv[1])) as watch:
        work(sys.argv[2])
    print("done", flush=True)
