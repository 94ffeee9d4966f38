"""A whole run and what its trackers are given of it, over several processes and across a resumption."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pivot_megatron.config.schema import Layout
from pivot_megatron.train.run_folder import read_metrics
from tests.dist.runs import config_tree, make_world, train_at, train_error, write_config
from tests.harness import Workers
from tests.trackers import as_given, events, single, wandb_history

installed = all(importlib.util.find_spec(package) for package in ("wandb", "tensorboard"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def tracked(data: Path, folder: Path, **tracking: Any) -> Path:
    return write_config(folder / "run.yaml", config_tree(data, folder / "run") | {"tracking": tracking})


class ToFile:
    name = "file"
    held = 0

    def __init__(self, path: Path) -> None:
        self.path = path

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        assert threading.current_thread() is not threading.main_thread()
        with self.path.open("a") as file:
            file.write(json.dumps([step, dict(values)]) + "\n")

    def close(self, failed: bool) -> None:
        assert not failed


def train_told_to_a_file(config_file: Path, layout: Layout, path: Path) -> int:
    from pivot_megatron.train import tracking

    tracking._opened = lambda *_: [ToFile(path)]
    return train_at(config_file, layout)


def train_and_list_trackers(config_file: Path, layout: Layout) -> list[str]:
    """A worker's job: the modules that alone import a tracker's package, of those that are imported."""
    train_at(config_file, layout)
    return [name for name in sys.modules if name.startswith("pivot_megatron.train.track_")]


def test_one_process_gives_every_line(data: Path, workers: Workers, tmp_path: Path) -> None:
    told = tmp_path / "told.jsonl"
    workers.run(train_told_to_a_file, None, 2, tracked(data, tmp_path), Layout(), told)
    workers.close()  # they have another `_opened` now
    found = [json.loads(line) for line in told.read_text().splitlines()]
    assert found == [[line["step"], as_given(line)] for line in read_metrics(tmp_path / "run")]
    assert len(found) == 9 and {"loss", "reward_accuracy", "save_seconds", "keys"} <= found[0][1].keys()


def test_off_imports_and_writes_nothing(data: Path, workers: Workers, tmp_path: Path) -> None:
    assert workers.run(train_and_list_trackers, None, 1, tracked(data, tmp_path), Layout()) == [[]]
    assert not {"wandb", "tensorboard"} & {path.name for path in (tmp_path / "run").iterdir()}


@pytest.mark.skipif(installed, reason="the tracking extra is installed")
def test_a_missing_package_stops_every_process_before_anything_is_made(
    data: Path, workers: Workers, tmp_path: Path
) -> None:
    config = tracked(data, tmp_path, wandb="offline")
    first, second = workers.run(train_error, None, 2, config, Layout())
    assert first == second and "pip install 'pivot-megatron[tracking]'" in first and "\n" not in first
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.skipif(not installed, reason="needs the tracking extra")
def test_both_hold_what_metrics_has_across_a_resumption(data: Path, workers: Workers, tmp_path: Path) -> None:
    """Two processes first, then one, from a step before the last that was tracked."""
    config = tracked(data, tmp_path, wandb="offline", tensorboard=True)
    run = tmp_path / "run"
    workers.run(train_at, None, 2, config, Layout())
    first = read_metrics(run)
    for later in ("step-000008", "step-000009"):
        shutil.rmtree(run / "checkpoints" / later)
    assert workers.run(train_at, None, 1, config, Layout()) == [5]
    again = read_metrics(run)
    assert wandb_history(run) == [(line["step"], as_given(line)) for line in first]  # of steps made again, the first
    numbers, texts = events(run)
    for name in ("loss", "grad_norm", "step_seconds", "reward_margin"):
        assert numbers[name] == [(line["step"], single(line[name])) for line in again], name
    assert first[8]["step_seconds"] != again[8]["step_seconds"]
    assert texts["keys"] == [(line["step"], line["keys"]) for line in again]
