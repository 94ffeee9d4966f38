"""What trains in bf16 is float32 behind it: from where a run begins, through what it hands on, to what is exported."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pivot_megatron.checkpoints.folder import resolve_checkpoint
from pivot_megatron.config.schema import Layout
from pivot_megatron.convert.commands import export_checkpoint
from pivot_megatron.convert.export import Trained
from pivot_megatron.convert.store import describe
from pivot_megatron.convert.stream import CheckpointParameters
from pivot_megatron.errors import UserError
from tests import matrix
from tests.dist.runs import config_tree, make_world, train_at, write_config
from tests.harness import Workers

STILL = {"learning_rate": 1e-60}  # less than any float32: weights stay as they are, bit for bit
BELOW = {"learning_rate": 1e-7}  # most 16-bit weights do: a step is a fraction of their last bit


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"), pairs=40)


def config(data: Path, folder: Path, **changes: object) -> Path:
    tree = config_tree(data, folder / "run") | {"precision": {"compute": "bf16"}, "objective": {"kind": "sft"}} | changes
    tree["batch"]["steps"] = 2
    folder.mkdir()
    return write_config(folder / "run.yaml", tree)


def parts(run: Path, component: str, masters: bool = True) -> dict[str, Tensor]:
    checkpoint = resolve_checkpoint(run / "run")
    parameters = CheckpointParameters(checkpoint / "tensors", masters)
    return dict(Trained(describe(checkpoint).architecture(), parameters).parts(component))


def stored(folder: Path) -> Mapping[str, Tensor]:
    found: Mapping[str, Tensor] = load_file(folder / "model.safetensors")
    return found


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> set[bool]:
    """`expected` may spell names with or without a prefix, and hold more."""
    whole = {name.removeprefix("vision_model."): tensor for name, tensor in expected.items()}
    pairs = [(tensor, whole[name.removeprefix("vision_model.")]) for name, tensor in found.items()]
    return {a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs}


def of(run: Path) -> dict[str, dict[str, str]]:
    return {part: {"checkpoint": str(run / "run")} for part in ("encoder", "projector", "llm")}


@matrix.layouts(matrix.DP2_BUCKETS, matrix.TP2, matrix.PP2, slow=(matrix.TP2_DP2,))
def test_float32_weights_come_through_bf16_runs(layout, world, data: Path, tmp_path: Path, workers: Workers) -> None:
    """Of folders, into a run, on into the next at another layout, and out again."""
    workers.run(train_at, None, world, config(data, tmp_path / "a", optimizer=STILL), layout)
    workers.run(train_at, None, 1, config(data, tmp_path / "b", optimizer=STILL, model=of(tmp_path / "a")), Layout())
    for run in (tmp_path / "a", tmp_path / "b"):
        for component in ("encoder", "llm"):
            begun = stored(data / component)
            assert same(parts(run, component), begun) == {True}
            rounded = {name: tensor.bfloat16() for name, tensor in begun.items()}
            assert same(parts(run, component, masters=False), rounded) == {True}


def test_less_than_a_bit_of_a_weight_is_handed_on_and_exported(data: Path, tmp_path: Path, workers: Workers) -> None:
    workers.run(train_at, None, 2, config(data, tmp_path / "a", optimizer=BELOW), Layout())
    begun = {n.removeprefix("vision_model."): t for n, t in stored(data / "encoder").items()}
    moved, rounded = parts(tmp_path / "a", "encoder"), parts(tmp_path / "a", "encoder", masters=False)
    total = sum(t.numel() for t in moved.values())
    start = {name: begun[name.removeprefix("vision_model.")] for name in moved}
    assert sum(int((moved[n] != start[n]).sum()) for n in moved) > 0.5 * total
    assert sum(int((rounded[n] != start[n].bfloat16()).sum()) for n in moved) < 0.1 * total

    workers.run(train_at, None, 1, config(data, tmp_path / "b", optimizer=STILL, model=of(tmp_path / "a")), Layout())
    assert same(parts(tmp_path / "b", "encoder"), moved) == {True}

    export_checkpoint(tmp_path / "a" / "run", "encoder", tmp_path / "whole", "drop", None)
    assert same(moved, stored(tmp_path / "whole")) == {True}
    export_checkpoint(tmp_path / "a" / "run", "encoder", tmp_path / "short", "drop", None, torch.bfloat16)
    assert same(rounded, stored(tmp_path / "short")) == {True}
    with pytest.raises(UserError, match="--dtype: what did not train keeps the original's own"):
        export_checkpoint(
            tmp_path / "a" / "run", "encoder", tmp_path / "no", "original", data / "encoder", torch.bfloat16
        )


def test_layers_that_are_frozen_have_none(data: Path, tmp_path: Path, workers: Workers) -> None:
    """Theirs are 16-bit; those above them in the same stack are float32 still, in the next run too, and in one that resumes."""
    rules = [{"match": "encoder.decoder.layers.0.*", "rate": "frozen"}]
    every = {"every": 1, "keep": 2}
    file = config(data, tmp_path / "a", optimizer=STILL, parameters=rules, checkpoints=every)
    workers.run(train_at, None, 2, file, Layout(tensor=2))
    shutil.rmtree(resolve_checkpoint(tmp_path / "a" / "run"))
    assert workers.run(train_at, None, 2, file, Layout(tensor=2)) == [1, 1]
    workers.run(train_at, None, 1, config(data, tmp_path / "b", optimizer=STILL, model=of(tmp_path / "a")), Layout())
    begun = {n.removeprefix("vision_model."): t for n, t in stored(data / "encoder").items()}
    first, second = (parts(tmp_path / run, "encoder") for run in "ab")
    for name, tensor in first.items():
        whole = begun[name.removeprefix("vision_model.")]
        if "layers.0." in name:
            assert torch.equal(tensor, whole.bfloat16())
            assert second[name].dtype == torch.float32 and torch.equal(second[name], tensor.float())
        else:
            assert torch.equal(tensor, whole) and torch.equal(second[name], whole)
