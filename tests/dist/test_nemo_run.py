"""launch/nemo_run.py, where nemo-run is installed: a run of two processes, and the batch script that SLURM would get."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pivot_megatron.train.run_folder import read_metrics
from tests.dist.runs import config_tree, make_world, write_config

pytest.importorskip("nemo_run", reason="the `nemo` extra is not installed")
ROOT = Path(__file__).parents[2]


def nemo_run(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "NEMORUN_HOME": str(folder / "nemo"), "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "launch" / "nemo_run.py"), *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_run_of_two_processes(tmp_path: Path) -> None:
    tree = config_tree(make_world(tmp_path / "world"), tmp_path / "run")
    config = write_config(tmp_path / "run.yaml", tree)
    nemo_run(tmp_path, str(config), "batch.steps=2", "--processes", "2")
    assert len(read_metrics(tmp_path / "run")) == 2
    submitted = nemo_run(
        tmp_path, str(config), "--slurm", "--account", "a", "--job-dir", str(tmp_path), "--nodes", "2", "--processes", "8", "--dry-run"
    )
    for line in ("#SBATCH --nodes=2", "#SBATCH --gpus-per-node=8", "#SBATCH --signal=USR1@300", "export MASTER_ADDR=${head_node_ip%% *}"):
        assert line in submitted
