"""Signals to real runs: saved, marked and ended with 0, and gone on from there as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from unittest.mock import patch

import psutil
import pytest
import torch.distributed as dist

from pivot_megatron.checkpoints.folder import steps_in
from pivot_megatron.config.load import load_config
from pivot_megatron.requeue import StopRequests
from pivot_megatron.train import trainer
from pivot_megatron.train.run_folder import read_metrics
from tests.dist.runs import config_tree, make_world, write_config
from tests.dist.test_resume import picked
from tests.harness import Workers

STEPS = 40
BACKWARD, SAVE = "pivot_megatron.train.session._computed", "pivot_megatron.train.checkpoint.Checkpointer.at_step"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def run_file(data: Path, folder: Path, **checkpoints: Any) -> Path:
    tree = config_tree(data, folder / "run")
    tree["batch"] |= {"steps": STEPS, "global_size": 4}
    tree["layout"] = {"cpu_threads": 1}
    tree["checkpoints"] = {"every": 1000, "keep": 10, **checkpoints}
    return write_config(folder / "run.yaml", tree)


@contextmanager
def started(config: Path, processes: int) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "pivot_megatron.cli", "train", str(config), "--processes", f"{processes}"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def until(condition: Any, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def steps_made(folder: Path, least: int) -> bool:
    file = folder / "run" / "metrics.jsonl"
    return file.exists() and file.read_text().count("\n") >= least


def mark(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run" / "requeue.json").read_text())
    return found


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("unbroken")
    with started(run_file(data, folder), 1) as process:
        assert process.wait(timeout=300) == 0
    assert not (folder / "run" / "requeue.json").exists()
    return picked(read_metrics(folder / "run"))


def test_a_lone_process_saves_marks_and_goes_on(data: Path, unbroken: list[dict[str, Any]], tmp_path: Path) -> None:
    config = run_file(data, tmp_path)
    with started(config, 1) as process:
        until(lambda: steps_made(tmp_path, 5), process)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=120) == 0
    made = len(read_metrics(tmp_path / "run"))
    assert 5 <= made < STEPS and (mark(tmp_path)["step"], mark(tmp_path)["signal"]) == (made, "SIGUSR1")
    assert [step for step, _ in steps_in(tmp_path / "run" / "checkpoints")] == [made]
    with started(config, 1) as process:
        assert process.wait(timeout=300) == 0
    assert picked(read_metrics(tmp_path / "run")) == unbroken
    assert not (tmp_path / "run" / "requeue.json").exists()


@pytest.mark.parametrize("to", ["launcher", pytest.param("one process", marks=pytest.mark.slow)])
def test_all_processes_stop_where_any_was_asked(to: str, data: Path, tmp_path: Path) -> None:
    with started(run_file(data, tmp_path), 2) as process:
        until(lambda: steps_made(tmp_path, 3), process)
        children = psutil.Process(process.pid).children()
        (process if to == "launcher" else children[1]).send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 0
    made = len(read_metrics(tmp_path / "run"))
    assert made < STEPS and (mark(tmp_path)["step"], mark(tmp_path)["signal"]) == (made, "SIGTERM")


def test_before_the_first_step_there_is_nothing_to_save(data: Path, tmp_path: Path) -> None:
    """As soon as the launcher stands, before its processes do."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "requeue.json").write_text("{}")
    with started(run_file(data, tmp_path), 2) as process:
        until(lambda: not (tmp_path / "run" / "requeue.json").exists(), process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 0
    assert mark(tmp_path)["step"] == 0 and not steps_in(tmp_path / "run" / "checkpoints")


def test_a_second_signal_ends_all_at_once(data: Path, tmp_path: Path) -> None:
    with started(run_file(data, tmp_path), 2) as process:
        until(lambda: steps_made(tmp_path, 2), process)
        children = psutil.Process(process.pid).children()
        for child in children:
            child.suspend()  # or the first one may be through before the second comes
        process.send_signal(signal.SIGTERM)
        time.sleep(1.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == 128 + signal.SIGTERM
    assert psutil.wait_procs(children, timeout=5)[1] == []
    assert not (tmp_path / "run" / "requeue.json").exists()


@pytest.mark.slow
def test_in_the_reference_pass_its_parts_are_kept(tmp_path: Path) -> None:
    data = make_world(tmp_path / "world", pairs=2000)
    with started(run_file(data, tmp_path), 1) as process:
        until(lambda: list((data / "pairs").glob("reference-*.parts/*")), process)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=60) == 0
    assert mark(tmp_path)["step"] == 0 and list((data / "pairs").glob("reference-*.parts/*.parquet"))


def test_a_killed_process_is_named_by_the_launcher(data: Path, tmp_path: Path) -> None:
    with started(run_file(data, tmp_path), 2) as process:
        until(lambda: steps_made(tmp_path, 2), process)
        psutil.Process(process.pid).children()[1].kill()
        began = time.monotonic()
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and time.monotonic() - began < 20
    assert f"pivot: process 1 on {socket.gethostname()} was killed by SIGKILL" in said


def train_and_be_asked(config_file: Path, name: str, step: int) -> int:
    """A worker's job: the run, of which the last rank is asked to stop when it has been through the function `name` in `step`."""
    requests, times, original = StopRequests(), 0, resolve_name(name)

    def asked(*arguments: Any, **options: Any) -> Any:
        nonlocal times
        times += 1
        found = original(*arguments, **options)
        if times == step and dist.get_rank() == dist.get_world_size() - 1:
            requests.signal = signal.SIGTERM
        return found

    with patch(name, asked):
        return trainer.train(load_config(config_file), requests=requests)


@pytest.mark.parametrize(
    ("checkpoints", "during", "asked", "ends"),
    [
        pytest.param({}, BACKWARD, 3, 3, id="backward"),
        pytest.param({}, SAVE, 4, 4, id="saved", marks=pytest.mark.slow),
        pytest.param(
            {"asynchronous": True, "most_blocked": 1.0}, SAVE, 2, 3, id="being saved"
        ),
        pytest.param(
            {"asynchronous": True, "most_blocked": 1e-4}, SAVE, 5, 6, id="put off"
        ),
    ],
)
def test_whenever_a_signal_comes_nothing_is_left_unsaved(
    checkpoints: dict[str, Any],
    during: str,
    asked: int,
    ends: int,
    data: Path,
    workers: Workers,
    tmp_path: Path,
) -> None:
    """The run stops after the step that is being made, or one later where that was over and its save is not whole."""
    config = run_file(data, tmp_path, every=2, **checkpoints)
    made = workers.run(train_and_be_asked, None, 2, config, during, asked)
    assert made == [ends, ends] and len(read_metrics(tmp_path / "run")) == ends
    assert (mark(tmp_path)["step"], mark(tmp_path)["signal"]) == (ends, "SIGTERM")
    found = [path for _, path in steps_in(tmp_path / "run" / "checkpoints")]
    assert found[-1].name == f"step-{ends:06d}" and len(found) == len(list(found[0].parent.iterdir()))
