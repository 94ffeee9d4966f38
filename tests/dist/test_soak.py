"""Two thousand small steps: memory stays flat, and no file stays open."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import numpy as np
import psutil
import pytest

from pivot_megatron.config.schema import Layout
from pivot_megatron.train.step import StepResult
from tests.dist.runs import config_tree, make_world, write_config
from tests.harness import Workers

STEPS, EVERY, WARM_UP, SAVES = 2000, 20, 600, 200
# A tensor kept of each step would be more, and so would a kept copy of what one save writes; what allocators add by fragments
# is less.
MOST_BYTES_A_STEP = 1024
MOST_OF_A_SAVE = 0.5


def soak(config_file: Path, out: Path) -> None:
    """A worker's job: the run, with resident memory and open files noted every few steps."""
    from dataclasses import replace

    from pivot_megatron.config.load import load_config
    from pivot_megatron.train.trainer import train

    process, noted = psutil.Process(), []

    def note(done: int, _of: int, _result: StepResult) -> None:
        if done % EVERY == 0:
            gc.collect()
            noted.append((done, process.memory_info().rss, process.num_fds(), process.num_threads()))

    train(replace(load_config(config_file), layout=Layout(cpu_threads=1)), note)
    if noted:
        out.write_text(json.dumps(noted))


@pytest.mark.long
def test_memory_and_files_stay_as_they_are(workers: Workers, tmp_path: Path) -> None:
    tree = config_tree(make_world(tmp_path / "world"), tmp_path / "run")
    tree |= {"batch": {**tree["batch"], "steps": STEPS}, "checkpoints": {"every": SAVES, "keep": 2}}
    config = write_config(tmp_path / "run.yaml", tree)
    workers.run(soak, None, 2, config, tmp_path / "noted.json", timeout=1500)
    steps, memory, files, threads = np.array(json.loads((tmp_path / "noted.json").read_text())).T
    late = steps > WARM_UP
    between = [memory[late & (steps > last) & (steps <= last + SAVES)] for last in range(WARM_UP, STEPS, SAVES)]
    a_step = np.median([(stretch[-2] - stretch[0]) / (EVERY * (len(stretch) - 2)) for stretch in between])
    a_save = (memory[-1] - memory[late][0]) / len(between)
    saved = sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoints").glob(f"*{STEPS}/**/*"))
    print(f"{a_step:.0f} bytes a step between saves, {a_save / saved:.2f} of a checkpoint's size a save")
    print(f"{memory[0] / 2**20:.1f} MiB at first, {memory[late][0] / 2**20:.1f} to {memory[-1] / 2**20:.1f} after step {WARM_UP}")
    print(f"files {files[late].min()} to {files[late].max()}, threads {threads[late].min()} to {threads[late].max()}")
    assert a_step < MOST_BYTES_A_STEP
    assert a_save < MOST_OF_A_SAVE * saved
    assert np.median(files[late][-10:]) <= np.median(files[late][:10])
    assert np.median(threads[late][-10:]) <= np.median(threads[late][:10])
