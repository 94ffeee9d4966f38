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
from pivot_megatron.convert.commands import import_checkpoint
from pivot_megatron.train.run_folder import read_metrics
from tests import matrix
from tests.dist.runs import config_tree, make_world, train_at, train_error, write_config
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
        "loss grad_norm learning_rate pairs tokens flops padding_share step_seconds data_seconds peak_bytes "
        "chosen_logps rejected_logps chosen_rewards "
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


BUCKETS = Layout(overlap_gradient_reduce=True, overlap_bucket_size=5000)


@pytest.mark.parametrize(
    ("saved_at", "saved_world", "resumed_at", "resumed_world"),
    [
        pytest.param(Layout(pipeline=2), 2, Layout(pipeline=2), 2, id="PP2-to-PP2"),
        pytest.param(Layout(pipeline=2), 2, Layout(), 1, id="PP2-to-TP1"),
        pytest.param(BUCKETS, 2, BUCKETS, 2, id="DP2-many-buckets"),
        pytest.param(BUCKETS, 2, Layout(tensor=2), 2, id="DP2-many-buckets-to-TP2"),
    ],
)
def test_buffers_of_several_buckets_are_saved_whole(
    saved_at, saved_world, resumed_at, resumed_world, workers: Workers, unbroken: Path, data: Path, tmp_path: Path
) -> None:
    """Tied embeddings on two stages, and overlap, cut a buffer into buckets with padding between them."""
    run = tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", config_tree(data, run))
    workers.run(train_at, None, saved_world, config, saved_at)
    for later in ("step-000008", "step-000009"):
        shutil.rmtree(run / "checkpoints" / later)
    assert workers.run(train_at, None, resumed_world, config, resumed_at)[0] == 5
    for found, expected in zip(read_metrics(run), read_metrics(unbroken), strict=True):
        assert found["keys"] == expected["keys"]
        for name in ("loss", "grad_norm", "reward_margin"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), (found["step"], name)


@matrix.layouts(matrix.SINGLE, matrix.TP2, matrix.PP2, matrix.TP2_PP2)
def test_a_stage_starts_from_the_last_ones_checkpoint(
    layout, world, workers: Workers, unbroken: Path, data: Path, tmp_path: Path
) -> None:
    """The next stage's first losses are the same at every layout; its reference is the model it began from."""
    config = write_config(tmp_path / "next.yaml", next_stage(data, unbroken, tmp_path / "next"))
    workers.run(train_at, None, world, config, layout)
    lines = read_metrics(tmp_path / "next")
    assert lines[0]["reward_margin"] == pytest.approx(0.0, abs=1e-6)
    assert lines[0]["chosen_logps"] == pytest.approx(NEXT["chosen_logps"], rel=1e-5)


NEXT: dict[str, float] = {}


@pytest.fixture(scope="module", autouse=True)
def next_stage_at_one_process(workers: Workers, unbroken: Path, data: Path, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("next")
    config = write_config(folder / "next.yaml", next_stage(data, unbroken, folder / "next"))
    workers.run(train_at, None, 2, config, Layout())
    NEXT.update(read_metrics(folder / "next")[0])


def next_stage(data: Path, previous: Path, out: Path) -> dict[str, Any]:
    tree = config_tree(data, out)
    tree["model"] = {part: {"checkpoint": str(previous)} for part in ("encoder", "projector", "llm")}
    tree["batch"]["steps"] = 1
    return tree


def test_the_reference_is_the_one_the_run_began_from(workers: Workers, unbroken: Path, data: Path, tmp_path: Path) -> None:
    """The folder it was read from may train on; the resumed run keeps to the checkpoint it recorded."""
    previous = tmp_path / "previous"
    (previous / "checkpoints").mkdir(parents=True)
    shutil.copytree(unbroken / "checkpoints" / "step-000004", previous / "checkpoints" / "step-000004")
    tree = next_stage(data, previous, tmp_path / "next") | {"checkpoints": {"every": 1, "keep": 10}}
    tree["batch"]["steps"] = 3
    config = write_config(tmp_path / "next.yaml", tree)
    workers.run(train_at, None, 1, config, Layout())
    whole = read_metrics(tmp_path / "next")
    for later in ("step-000002", "step-000003"):
        shutil.rmtree(tmp_path / "next" / "checkpoints" / later)
    shutil.copytree(unbroken / "checkpoints" / "step-000009", previous / "checkpoints" / "step-000009")
    workers.run(train_at, None, 1, config, Layout())
    assert picked(read_metrics(tmp_path / "next")) == picked(whole)


def test_a_start_that_changed_is_refused(workers: Workers, data: Path, tmp_path: Path) -> None:
    """A head's folder with other weights in it, and an import that was made anew in its place: the reference would be another."""
    shutil.copytree(data / "llm", tmp_path / "llm")
    import_checkpoint(data / "encoder", data / "llm", tmp_path / "start", None, 1)
    tree = config_tree(data, tmp_path / "run") | {"checkpoints": {"every": 1, "keep": 10}}
    tree["model"] = {"encoder": {"checkpoint": str(tmp_path / "start")}, "llm": {"hf": str(tmp_path / "llm")}}
    tree["batch"]["steps"] = 2
    config = write_config(tmp_path / "run.yaml", tree)
    workers.run(train_at, None, 1, config, Layout())
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000002")
    weights = tmp_path / "llm" / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    (message,) = workers.run(train_error, None, 1, config, Layout())
    assert message.startswith(f"model.llm.hf: {tmp_path / 'llm'}: expected weights ") and len(message.splitlines()) == 1
    weights.write_bytes(before)
    shutil.rmtree(tmp_path / "start")
    import_checkpoint(data / "encoder", data / "llm", tmp_path / "start", None, 1)
    (message,) = workers.run(train_error, None, 1, config, Layout())
    assert message.startswith(f"model.encoder.checkpoint: {tmp_path / 'start'}: expected weights ")


def test_a_config_that_changed_is_refused(workers: Workers, unbroken: Path, data: Path, tmp_path: Path) -> None:
    """Each key that the losses follow from, one line each; the run's folder is left as it was."""
    tree = config_tree(data, unbroken)
    tree["optimizer"] |= {"learning_rate": 2e-3}
    tree["batch"] |= {"global_size": 6}
    tree["faults"] = {"spike_factor": 3.0}
    config = write_config(tmp_path / "run.yaml", tree)
    before = (unbroken / "config.yaml").read_text()
    (message,) = workers.run(train_error, None, 1, config, Layout())
    assert [line.split(":")[0] for line in message.splitlines()] == ["optimizer", "batch", "faults.spike_factor"]
    assert (unbroken / "config.yaml").read_text() == before


def test_the_reward_baseline_goes_on(workers: Workers, data: Path, tmp_path: Path) -> None:
    """Saved by a rank without a loss of its own (the first stage), read back exactly, and at another layout."""
    tree = config_tree(data, tmp_path / "run")
    tree["objective"] = {"kind": "dpo", "beta": 0.5, "losses": {"sigmoid": 0.8, "bco": 0.2, "sft": 1.0}}
    tree["batch"]["steps"] = 6
    config = write_config(tmp_path / "run.yaml", tree)
    workers.run(train_at, None, 2, config, Layout(pipeline=2))
    whole = read_metrics(tmp_path / "run")
    rewards = [(line["chosen_rewards"] + line["rejected_rewards"]) / 2 for line in whole]
    for step, line in enumerate(whole):
        assert line["reward_baseline"] == pytest.approx(sum(rewards[:step]) / max(step, 1), rel=1e-5, abs=1e-9)
    assert abs(whole[4]["reward_baseline"]) > 1e-3
    for layout, tolerance in ((Layout(pipeline=2), 0.0), (Layout(), 1e-4)):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000006")
        assert workers.run(train_at, None, 2, config, layout) == [2, 2]
        again = read_metrics(tmp_path / "run")
        for name in ("loss", "reward_baseline"):
            assert [line[name] for line in again] == pytest.approx([line[name] for line in whole], rel=tolerance, abs=0)


@pytest.mark.slow
def test_bf16_goes_on_at_another_layout(workers: Workers, data: Path, tmp_path: Path) -> None:
    """bf16 with fp32 masters: resumed bit for bit at its own layout, and within bf16's rounding at another."""
    tree = config_tree(data, tmp_path / "run") | {"precision": {"compute": "bf16"}}
    config = write_config(tmp_path / "run.yaml", tree)
    workers.run(train_at, None, 2, config, Layout())
    whole = read_metrics(tmp_path / "run")
    assert whole[-1]["loss"] < whole[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    for layout, tolerance in ((Layout(), 0.0), (Layout(tensor=2), 2e-2)):
        for later in ("step-000008", "step-000009"):
            shutil.rmtree(tmp_path / "run" / "checkpoints" / later)
        workers.run(train_at, None, 2, config, layout)
        again = read_metrics(tmp_path / "run")
        assert [line["loss"] for line in again] == pytest.approx([line["loss"] for line in whole], rel=tolerance)


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
