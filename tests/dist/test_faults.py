"""Whole runs with a step that is not finite, or spikes: not applied, named, gone on from, and stopped at where it does not end."""

from __future__ import annotations

import json
import math
import shutil
import unittest.mock
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pivot_megatron.config.load import load_config
from pivot_megatron.config.schema import Layout
from pivot_megatron.checkpoints.folder import steps_in
from pivot_megatron.errors import RuleError
from pivot_megatron.train.run_folder import read_metrics
from tests import matrix
from tests.dist.runs import config_tree, loader, make_world, write_config
from tests.dist.test_resume import picked
from tests.harness import Workers


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def run_file(data: Path, folder: Path, steps: int = 6, every: int = 4, **faults: Any) -> Path:
    tree = config_tree(data, folder / "run") | {"faults": faults}
    tree["batch"]["steps"] = steps
    tree["checkpoints"]["every"] = every
    return write_config(folder / "run.yaml", tree)


def key_of_step(data: Path, step: int) -> str:
    return str(loader(data, global_size=12, micro_tokens=256, sequence_length=128).load(step - 1).micro_batches[0].keys[0])


def train_poisoned(config_file: Path, layout: Layout, keys: Collection[str], poison: float) -> str:
    """A worker's job: the run, in which `poison` is added to the loss of every micro-batch with one of `keys` in it, or, where it
    is not finite, multiplies their log-probs. Returns what it was stopped with."""
    from pivot_megatron.train import step, trainer

    plain = step._loss

    def poisoned(objective: Any, batch: Any, logprobs: Any) -> Any:
        if math.isfinite(poison) or not set(keys) & set(batch.keys):
            total, count, told = plain(objective, batch, logprobs)
            extra = poison if set(keys) & set(batch.keys) else 0.0
            return total + extra, count, {**told, "loss": told["loss"] + extra}
        own = sum((batch.branch // 2 == batch.keys.index(key)) for key in set(keys) & set(batch.keys)).bool()
        return plain(objective, batch, logprobs * torch.ones(len(own)).masked_fill(own, poison))

    with unittest.mock.patch.object(step, "_loss", poisoned):
        try:
            trainer.train(replace(load_config(config_file), layout=layout))
        except RuleError as error:
            return str(error)
    return ""


def faults(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "faults.jsonl").read_text().splitlines()]


@matrix.layouts(matrix.DP2, slow=(matrix.TP2_PP2,))
def test_a_step_that_is_not_finite_is_left_out(layout, world, data: Path, workers: Workers, tmp_path: Path) -> None:
    key = key_of_step(data, 3)
    config = run_file(data, tmp_path)
    assert set(workers.run(train_poisoned, None, world, config, layout, [key], math.nan)) == {""}
    lines = read_metrics(tmp_path / "run")
    assert [line["applied"] for line in lines] == [True, True, False, True, True, True]
    assert lines[2]["loss"] is None and all(math.isfinite(line["loss"]) for line in lines if line["applied"])
    assert lines[3]["learning_rate"] == lines[2]["learning_rate"] != lines[4]["learning_rate"]
    (fault,) = faults(tmp_path)
    assert (fault["step"], fault["reason"]) == (3, "loss nan and gradient norm nan")
    (sample,) = fault["samples"]
    assert sample["keys"] == [key] and fault["modules"] == fault["parameters"] == [] and len(fault["gradients"]) > 3

    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000006")
    workers.run(train_poisoned, None, world, config, layout, [key], math.nan)
    again = read_metrics(tmp_path / "run")
    assert picked(again)[3:] == picked(lines)[3:] and [line["applied"] for line in again] == [l["applied"] for l in lines]
    assert faults(tmp_path) == [fault]


def test_where_it_does_not_end_the_run_stops_and_saves_nothing(data: Path, workers: Workers, tmp_path: Path) -> None:
    keys = [key_of_step(data, step) for step in (2, 3)]
    config = run_file(data, tmp_path, every=3, most_skipped=1)
    for said in workers.run(train_poisoned, None, 2, config, Layout(), keys, math.inf):
        assert said.startswith("faults.most_skipped: step 3: loss ") and "2 steps in a row were not applied" in said
        assert len(said.splitlines()) == 1
    assert not steps_in(tmp_path / "run" / "checkpoints") and len(read_metrics(tmp_path / "run")) == 3


def test_a_spike_is_left_out_also_by_a_run_that_resumed(data: Path, workers: Workers, tmp_path: Path) -> None:
    """The median goes on from a checkpoint: a window of four steps is not full again in the two that come after it."""
    key = key_of_step(data, 6)
    config = run_file(data, tmp_path, every=4, spike_factor=3.0, spike_window=4)
    (said,) = workers.run(train_poisoned, None, 1, config, Layout(), [key], 50.0)
    lines = read_metrics(tmp_path / "run")
    assert said == "" and [line["applied"] for line in lines] == [True] * 5 + [False]
    (fault,) = faults(tmp_path)
    assert "a spike over the median 0." in fault["reason"] and key in fault["samples"][0]["keys"]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000006")
    workers.run(train_poisoned, None, 1, config, Layout(), [key], 50.0)
    assert picked(read_metrics(tmp_path / "run")) == picked(lines) and faults(tmp_path) == [fault]


def test_the_slowest_rank_is_on_record(data: Path, workers: Workers, tmp_path: Path) -> None:
    config = run_file(data, tmp_path, straggler_steps=2, straggler_factor=1.0001)
    workers.run(train_poisoned, None, 2, config, Layout(), [], 0.0)
    lines = [json.loads(line) for line in (tmp_path / "run" / "stragglers.jsonl").read_text().splitlines()]
    assert [(line["step"], line["steps"]) for line in lines] == [(2, 2), (4, 2), (6, 2)]
    for line in lines:
        assert line["rank"] in (0, 1) and line["slower"] >= 1 and 0 <= line["data_seconds"] <= line["seconds"]
        assert 0 < line["median_seconds"] <= line["seconds"]
