"""A run's checkpoints are whole or absent: saved while it trains on, killed, refused by the disk, damaged afterwards."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
import unittest.mock
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pivot_megatron.checkpoints.folder import opened, saved_of, steps_in
from pivot_megatron.checkpoints.manifest import Manifest
from pivot_megatron.cli import main
from pivot_megatron.config.schema import Layout
from pivot_megatron.convert import saving
from pivot_megatron.convert.commands import import_checkpoint
from pivot_megatron.convert.store import Description
from pivot_megatron.errors import RunError
from pivot_megatron.runtime.watch import Watch
from pivot_megatron.train import culprits, trainer
from pivot_megatron.train.run_folder import read_metrics
from tests.checkpoints import flip
from tests.dist.runs import config_tree, make_world, train_at, train_error, write_config
from tests.harness import Workers

BEHIND = {"asynchronous": True, "most_blocked": 1.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def config(data: Path, folder: Path, steps: int = 6, **checkpoints: Any) -> Path:
    tree = config_tree(data, folder / "run")
    tree["batch"]["steps"] = steps
    tree["checkpoints"] = {"every": 2, "keep": 10, **checkpoints}
    return write_config(folder / "run.yaml", tree)


def exact(run: Path) -> list[tuple[float, ...]]:
    return [tuple(line[name] for name in ("step", "loss", "grad_norm", "reward_margin")) for line in read_metrics(run)]


def steps_of(run: Path) -> list[int]:
    """Of the checkpoints there, each as it was written; beside them lies nothing."""
    found = steps_in(run / "checkpoints")
    assert len(found) == len(list((run / "checkpoints").iterdir()))
    for _, path in found:
        opened(path).require_sound(path, opened(path).blocks(opened(path).files))
    return [step for step, _ in found]


@contextmanager
def patched(owner: Any, name: str, changed: Callable[..., Any]) -> Iterator[None]:
    """In a worker, where pytest has no hands: `changed` is given the original before its arguments."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *a, **k: changed(original, *a, **k))
    try:
        yield
    finally:
        setattr(owner, name, original)


def train_with_a_slow_disk(config_file: Path, layout: Layout, seconds: float) -> int:
    def slow(write: Callable[..., Any], *arguments: Any) -> Any:
        time.sleep(seconds)
        return write(*arguments)

    with patched(saving, "_write_bucket", slow):
        return train_at(config_file, layout)


@pytest.mark.parametrize(
    ("layout", "world"),
    [
        pytest.param(Layout(), 1, id="TP1", marks=pytest.mark.slow),
        pytest.param(Layout(), 2, id="DP2"),
        pytest.param(Layout(tensor=2), 2, id="TP2", marks=pytest.mark.slow),
    ],
)
def test_what_is_saved_behind_training_is_what_was_there(
    layout: Layout, world: int, workers: Workers, data: Path, tmp_path: Path
) -> None:
    """A disk so slow that the weights change before they are written; the run that resumes is the unbroken one, bit for bit."""
    (tmp_path / "whole").mkdir()
    workers.run(train_at, None, world, config(data, tmp_path / "whole"), layout)
    slow = config(data, tmp_path, **BEHIND)
    workers.run(train_with_a_slow_disk, None, world, slow, layout, 1.0)
    whole, run = tmp_path / "whole" / "run", tmp_path / "run"
    assert exact(run) == exact(whole)
    assert steps_of(whole) == [2, 4, 6]
    steps = steps_of(run)
    assert steps[0] == 2 and steps[-1] == 6  # the one due after 4 came later, or with the last
    first = saved_of(run / "checkpoints" / "step-000002")
    assert first is not None and first.metrics["loss"] == pytest.approx(sum(row[1] for row in exact(run)[:2]) / 2)
    for step, path in steps_in(run / "checkpoints"):
        if step != 2:
            path.rename(tmp_path / path.name)
    assert set(workers.run(train_at, None, world, config(data, tmp_path), layout)) == {4}
    assert exact(run) == exact(whole)


def test_nothing_that_training_changes_is_written() -> None:
    """What lies on the host already is copied, and what was fetched there is not copied once more."""
    weights, fetched = torch.ones(3), torch.ones(3)
    held = ("path", "name", ([], [("item", weights), ("other", torch.zeros(3))]))
    *_, (_, [(_, ours), (_, same)]) = saving._copied(("path", "name", ([], [("item", weights), ("other", fetched)])), held)
    weights.zero_()
    assert ours.tolist() == [1, 1, 1] and same is fetched


def test_saves_are_put_off_and_said(data: Path, tmp_path: Path) -> None:
    """With hardly a share of the time, only the first is written before the end."""
    path = config(data, tmp_path, asynchronous=True, most_blocked=1e-4)
    ended = subprocess.run(
        [sys.executable, "-m", "pivot_megatron.cli", "train", str(path)], capture_output=True, text=True, check=True
    )
    assert steps_of(tmp_path / "run") == [2, 6]
    assert "the save due after step 4 is put off: " in ended.stderr
    assert "saves that came later than they were due: 1" in ended.stderr
    lines = read_metrics(tmp_path / "run")
    assert [line["save_seconds"] > 0 for line in lines[:3]] == [False, False, True]


def train_and_count_scans(config_file: Path) -> int:
    """Returns how often weights and moments were looked through."""
    scans: list[None] = []

    def counted(scan: Callable[..., Any], optimization: Any) -> Any:
        scans.append(None)
        return scan(optimization)

    with patched(culprits, "_state_tensors", counted):
        train_at(config_file, Layout())
    return len(scans)


def test_a_save_that_is_put_off_looks_through_nothing(workers: Workers, data: Path, tmp_path: Path) -> None:
    path = config(data, tmp_path, asynchronous=True, most_blocked=1e-4)
    assert workers.run(train_and_count_scans, None, 1, path) == [2] and steps_of(tmp_path / "run") == [2, 6]


def train_and_see_what_finishing_is_taken_for(config_file: Path, stopped: bool) -> list[tuple[Any, ...]]:
    """What the watch was told last whenever a save was finished, the first of them in step 3, which may stop the run."""
    told: list[tuple[Any, ...]] = []
    finished: list[tuple[Any, ...]] = []

    def at(original: Callable[..., Any], watch: Any, phase: str, step: int = 0, files: bool = False) -> None:
        told.append((phase, step, files))
        original(watch, phase, step, files)

    def finish(original: Callable[..., Any], saving: Any) -> None:
        finished.append(told[-1])
        original(saving)

    def require(original: Callable[..., Any], session: Any, result: Any) -> None:
        if stopped and session.done == 3:
            raise RunError("stopped")

    with (
        patched(Watch, "at", at),
        patched(saving.Saving, "finish", finish),
        patched(trainer, "require_progress", require),
        unittest.mock.patch.object(saving.Saving, "written", not stopped),
        suppress(RunError),
    ):
        train_at(config_file, Layout())
    return finished


@pytest.mark.parametrize("stopped", [False, True])
def test_a_save_that_is_finished_later_has_the_patience_of_a_save(
    stopped: bool, workers: Workers, data: Path, tmp_path: Path
) -> None:
    path = config(data, tmp_path, steps=3, **BEHIND)
    (finished,) = workers.run(train_and_see_what_finishing_is_taken_for, None, 1, path, stopped)
    assert finished[0] == ("saving", 3, True) and {phase for phase, *_ in finished} == {"saving"}
    assert steps_of(tmp_path / "run") == ([2] if stopped else [2, 3])


def test_a_run_folder_that_cannot_be_made_is_one_line_on_every_rank(
    workers: Workers, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").write_text("in the way")
    one, other = workers.run(train_error, None, 2, config(data, tmp_path), Layout())
    assert one == other and one.startswith(f"out: cannot write to {tmp_path / 'run'} (") and "\n" not in one


def test_what_stays_is_what_the_config_says(workers: Workers, data: Path, tmp_path: Path) -> None:
    best = {"metric": "grad_norm_", "count": 1}
    wrong = config(data, tmp_path, steps=8, keep=1, keep_every=6, keep_best=best)
    (said,) = workers.run(train_error, None, 1, wrong, Layout())
    assert said.startswith("checkpoints.keep_best.metric: expected one of loss, ") and "found grad_norm_" in said
    assert not (tmp_path / "run").exists()  # before anything was made, a reference for one
    right = config(data, tmp_path, steps=8, keep=1, keep_every=6, keep_best={"metric": "loss", "largest": True})
    workers.run(train_at, None, 1, right, Layout())
    losses = [row[1] for row in exact(tmp_path / "run")]
    means = {step: (losses[step - 2] + losses[step - 1]) / 2 for step in (2, 4, 6, 8)}
    assert steps_of(tmp_path / "run") == sorted({8, 6, max(means, key=lambda step: means[step])})


def test_one_bit_stops_a_resume(workers: Workers, data: Path, tmp_path: Path) -> None:
    """Every rank says the same, whichever read the block."""
    path = config(data, tmp_path, steps=2)
    workers.run(train_at, None, 2, path, Layout())
    damaged = sorted((tmp_path / "run" / "checkpoints" / "step-000002" / "tensors").glob("*.distcp"))
    for file in damaged:
        flip(file, file.stat().st_size // 2)
        one, other = workers.run(train_error, None, 2, path, Layout())
        assert one == other and one.startswith(f"{file}: expected CRC-32") and "\n" not in one
        flip(file, file.stat().st_size // 2)
    assert workers.run(train_at, None, 2, path, Layout()) == [0, 0]


def test_inspect_says_what_it_holds(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Parameters counted against the files that it was imported from, and transformers' own count."""
    import_checkpoint(data / "encoder", data / "llm", tmp_path / "checkpoint", None, 5)
    assert main(["checkpoint", "inspect", str(tmp_path / "checkpoint"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["damage"] is None and found["saved"] is None
    tensors = load_file(data / "encoder" / "model.safetensors")
    past = ("vision_model.encoder.layers.2.", "vision_model.post_layernorm.", "vision_model.head.")
    encoder = sum(t.numel() for name, t in tensors.items() if not name.startswith(past))
    llm = AutoModelForCausalLM.from_pretrained(data / "llm").num_parameters()
    counts = {name: part["parameters"] for name, part in found["components"].items()}
    assert counts == {"encoder": encoder, "projector": 2 * (32 * 32 + 32), "llm": llm}
    assert found["components"]["encoder"]["family"] == "siglip" and found["components"]["llm"]["layers"] == 2
    assert main(["checkpoint", "inspect", str(tmp_path / "checkpoint")]) == 0
    assert "checksums    hold" in capsys.readouterr().out


REFUSALS: dict[str, tuple[Any, str, int]] = {
    "folder": (Path, "mkdir", 0),
    "small files": (Description, "copy_to", 0),
    "tensors": (saving, "_write_bucket", 1),
    "checksums": (saving, "sum_file", 1),
    "list": (Manifest, "write", 0),
    "rename": (saving, "appear", 0),
}


def train_on_a_full_disk(config_file: Path, layout: Layout, where: str) -> str:
    """The second save is refused at `where`, on one rank."""
    owner, name, rank = REFUSALS[where]

    def refuse(original: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        at = config_file.parent / "run" / "checkpoints"
        second = (at / "step-000002").exists() and not (at / "step-000004").exists()
        if second and int(os.environ["RANK"]) == rank and (name != "mkdir" or ".step-" in str(arguments[0])):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")
        return original(*arguments, **options)

    with patched(owner, name, refuse):
        return train_error(config_file, layout)


@pytest.mark.parametrize(
    ("where", "behind"),
    [
        ("tensors", False),
        ("tensors", True),
        ("rename", True),
        pytest.param("folder", False, marks=pytest.mark.slow),
        pytest.param("small files", False, marks=pytest.mark.slow),
        pytest.param("checksums", True, marks=pytest.mark.slow),
        pytest.param("list", True, marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_leaves_the_last_one_whole(
    where: str, behind: bool, workers: Workers, data: Path, tmp_path: Path
) -> None:
    """Every rank says so in the same line, and nothing else is left of the save; the run goes on from the one before."""
    layout = Layout(tensor=2)  # so that both ranks have something to write
    path = config(data, tmp_path, steps=5, **(BEHIND if behind else {}))
    one, other = workers.run(train_on_a_full_disk, None, 2, path, layout, where)
    assert one == other and "cannot write (No space left on device)" in one and "\n" not in one
    assert steps_of(tmp_path / "run") == [2]
    if where == "tensors":
        assert workers.run(train_at, None, 2, path, layout) == [3, 3]


def test_a_disk_that_fills_up_is_one_line(data: Path, tmp_path: Path) -> None:
    """A real one, as far as this process can tell: no file may have more bytes than so many."""
    path = config(data, tmp_path, **BEHIND)
    ended = subprocess.run(
        [sys.executable, "-m", "pivot_megatron.cli", "train", str(path), "--processes", "2"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    (line,) = [text for text in ended.stderr.splitlines() if text.startswith("pivot: ")]
    assert "step-000002: cannot write (" in line and "Traceback" not in ended.stderr
    assert steps_of(tmp_path / "run") == []


HANG = """
import sys, time
from pivot_megatron.cli import main
from pivot_megatron.convert import saving

write = saving._write_bucket
saving._write_bucket = lambda request, *a: write(request, *a) if "step-000002" in a[1][0] else time.sleep(600)
main(sys.argv[1:])
"""


def test_kill_while_writing(data: Path, tmp_path: Path) -> None:
    """kill -9 in the middle of a save that training runs on from: the one before is whole, and the rerun clears the rest away."""
    (tmp_path / "whole").mkdir()
    train = [sys.executable, "-m", "pivot_megatron.cli", "train"]
    subprocess.run([*train, str(config(data, tmp_path / "whole"))], check=True)
    path, run = config(data, tmp_path, **BEHIND), tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", HANG, "train", str(path)])
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < 6:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list((run / "checkpoints").glob(".step-*"))  # the fourth, or a later one where a slow disk put that off
    assert [step for step, _ in steps_in(run / "checkpoints")] == [2]
    subprocess.run([*train, str(path)], check=True)
    assert steps_of(run)[-1] == 6
    assert exact(run) == exact(tmp_path / "whole" / "run")
