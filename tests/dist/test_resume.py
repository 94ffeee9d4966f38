"""A run broken off anywhere goes on as if it had not been, at the same layout and at others."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pivot_megatron.config.schema import Layout
from pivot_megatron.train.run_folder import read_metrics
from tests import matrix
from tests.dist.runs import config_tree, make_world, train_at, write_config
from tests.harness import Workers

EXACT = ("step", "loss", "grad_norm", "learning_rate", "pairs", "tokens", "keys", "reward_margin", "chosen_logps")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def picked(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: line[name] for name in EXACT} for line in lines]


@pytest.fixture(scope="module")
def unbroken(data: Path, workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine steps over two data-parallel ranks, checkpoints after 4, 8 and 9."""
    folder = tmp_path_factory.mktemp("unbroken")
    config = write_config(folder / "run.yaml", config_tree(data, folder / "run"))
    assert workers.run(train_at, None, 2, config, Layout()) == [9, 9]
    return folder / "run"


def test_metrics_have_the_documented_names(unbroken: Path) -> None:
    lines = read_metrics(unbroken)
    assert [line["step"] for line in lines] == list(range(1, 10))
    documented = (
        "loss grad_norm learning_rate pairs tokens step_seconds data_seconds chosen_logps rejected_logps chosen_rewards "
        "rejected_rewards reward_margin reward_accuracy"
    )
    assert set(documented.split()) <= lines[0].keys()
    assert lines[0]["loss"] == pytest.approx(0.693147, abs=1e-5)  # policy and reference are the same model
    assert all(line["pairs"] == 12 for line in lines)


@matrix.layouts(matrix.SINGLE, matrix.TP2, matrix.PP2, matrix.DP2_OVERLAP, matrix.TP2_PP2)
def test_resume_at_another_layout(layout, world, workers: Workers, unbroken: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copytree(unbroken / "checkpoints" / "step-000004", run / "checkpoints" / "step-000004")
    config = write_config(tmp_path / "run.yaml", config_tree(data, run))
    assert set(workers.run(train_at, None, world, config, layout)) == {5}
    found, expected = read_metrics(run), read_metrics(unbroken)[4:]
    assert [line["step"] for line in found] == [5, 6, 7, 8, 9]
    for a, b in zip(found, expected):
        assert a["keys"] == b["keys"]
        for name in ("loss", "grad_norm", "reward_margin", "chosen_logps"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), (a["step"], name)


def start(config: Path) -> subprocess.Popen[bytes]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.Popen([sys.executable, "-m", "pivot_megatron.cli", "train", str(config)], env=environment)


def test_kill_and_rerun_is_exact(data: Path, tmp_path: Path) -> None:
    """kill -9 between two checkpoints, in the middle of an epoch: the rerun repeats what was lost, bit for bit."""
    whole = write_config(tmp_path / "whole.yaml", config_tree(data, tmp_path / "whole"))
    assert start(whole).wait(timeout=300) == 0

    broken = write_config(tmp_path / "broken.yaml", config_tree(data, tmp_path / "broken"))
    process = start(broken)
    metrics = tmp_path / "broken" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not metrics.exists() or metrics.read_text().count("\n") < 6:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = read_metrics(tmp_path / "broken")
    assert 6 <= len(before) < 9

    assert start(broken).wait(timeout=300) == 0
    assert picked(read_metrics(tmp_path / "broken")) == picked(read_metrics(tmp_path / "whole"))
    assert picked(before)[:4] == picked(read_metrics(tmp_path / "whole"))[:4]


def test_finished_run_does_nothing(unbroken: Path, data: Path, workers: Workers, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", config_tree(data, unbroken))
    before = (unbroken / "metrics.jsonl").read_text()
    assert workers.run(train_at, None, 2, config, Layout()) == [0, 0]
    assert (unbroken / "metrics.jsonl").read_text() == before
