"""Processes that die, stop or block, for real: the job ends within the stated time, and the one to blame is named."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.dist.watched import SILENCE, STEP, STEPS

HOST = socket.gethostname()
SLACK = 10.0  # seconds that a busy machine may add


@contextmanager
def job(folder: Path, how: str, processes: int = 3) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that find each other by their environment, as srun starts them: nobody looks after them but they themselves."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": f"{processes}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    command = [sys.executable, "-m", "tests.dist.watched", str(folder / "stacks"), how]
    started = [
        subprocess.Popen(
            command,
            env={**shared, "RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "LOCAL_WORLD_SIZE": f"{processes}"},
            stdout=(folder / f"{rank}.out").open("w"),
            stderr=(folder / f"{rank}.err").open("w"),
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def steps_made(folder: Path, rank: int, steps: int) -> None:
    deadline = time.monotonic() + 120
    while (folder / f"{rank}.out").read_text().count("step") < steps:
        assert time.monotonic() < deadline, (folder / f"{rank}.err").read_text()
        time.sleep(0.05)


def said(folder: Path, rank: int) -> list[str]:
    return [line for line in (folder / f"{rank}.err").read_text().splitlines() if line.startswith("pivot:")]


def ended(processes: list[subprocess.Popen[str]], within: float) -> None:
    """All of them, by themselves and not well."""
    deadline = time.monotonic() + within + SLACK
    for process in processes:
        assert process.wait(timeout=max(0.0, deadline - time.monotonic())) != 0


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_rank_that_is_killed_is_named(rank: int, tmp_path: Path) -> None:
    """Also the one that holds the store that they talk through."""
    with job(tmp_path, "fine") as processes:
        steps_made(tmp_path, 2, 2)
        processes[rank].send_signal(signal.SIGKILL)
        others = [process for process in processes if process is not processes[rank]]
        ended(others, within=SILENCE)
    lines = [line for other in range(3) for line in said(tmp_path, other)]
    assert lines and all(f"rank {rank} on {HOST} gave no sign of life" in line for line in lines)


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_rank_that_is_stopped_is_named(rank: int, tmp_path: Path) -> None:
    with job(tmp_path, "fine") as processes:
        steps_made(tmp_path, 2, 2)
        processes[rank].send_signal(signal.SIGSTOP)
        others = [process for process in processes if process is not processes[rank]]
        ended(others, within=2 * SILENCE)
    lines = [line for other in range(3) for line in said(tmp_path, other)]
    assert lines and all(f"rank {rank} on {HOST} gave no sign of life" in line for line in lines)
    stacks = (tmp_path / "stacks" / "rank-00002.txt").read_text()
    assert "all_reduce" in stacks and lines[0].removeprefix("pivot: ").split(";")[0] in stacks


def test_a_rank_that_blocks_is_named_with_what_it_was_at(tmp_path: Path) -> None:
    with job(tmp_path, "block") as processes:
        steps_made(tmp_path, 0, 2)
        ended(processes, within=2 * STEP)
    (line,) = [line for rank in range(3) for line in said(tmp_path, rank)]
    assert f"rank 1 on {HOST} has been at step 3, waiting for data for" in line and "the others wait (faults.seconds_to_hang)" in line
    assert "in work" in (tmp_path / "stacks" / "rank-00001.txt").read_text()


@pytest.mark.slow
def test_a_job_of_which_no_rank_gets_on_ends(tmp_path: Path) -> None:
    with job(tmp_path, "all", processes=2) as processes:
        ended(processes, within=2 * STEP + 60)
    (line,) = [line for rank in range(2) for line in said(tmp_path, rank)]
    assert "all 2 ranks have been at step 3, forward and backward for" in line


@pytest.mark.slow
def test_a_rank_that_fails_by_itself_is_quoted(tmp_path: Path) -> None:
    with job(tmp_path, "fail", processes=2) as processes:
        ended(processes, within=2 * SILENCE + 60)
    assert f"rank 1 on {HOST} ended: sample 007 is broken" in said(tmp_path, 0)[0]


@pytest.mark.slow
def test_what_takes_long_and_may_ends_nothing(tmp_path: Path) -> None:
    """A save of twice a step's time on one rank, and then a job that was suspended as a whole for longer than anything."""
    with job(tmp_path, "slow", processes=2) as processes:
        steps_made(tmp_path, 0, 20)
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        time.sleep(SILENCE + STEP + 1)
        for process in processes:
            process.send_signal(signal.SIGCONT)
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert [(tmp_path / f"{rank}.out").read_text().count("step") for rank in range(2)] == [STEPS, STEPS]
