"""A checkpoint has no layout: what any saved is read whole from its files, and loaded at any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pivot_megatron.config.schema import Component, Encoder, Layout, Model
from pivot_megatron.convert import hf
from pivot_megatron.convert.commands import export_checkpoint
from pivot_megatron.convert.load import hf_source, shard_of
from pivot_megatron.convert.plan import component_rows, parameter_shape
from pivot_megatron.convert.start import describe_start
from pivot_megatron.convert.stream import CheckpointParameters
from pivot_megatron.convert.verify import verify_checkpoint
from tests import matrix
from tests.harness import Workers
from tests.parity import checkpoint_jobs, jobs
from tests.parity.encoders import make
from tests.parity.imported import imported

LAYOUTS = (matrix.SINGLE, matrix.TP2, matrix.PP2, matrix.TP2_PP2)


@matrix.layouts(*LAYOUTS)
def test_what_any_layout_saves_is_read_whole(
    layout: Layout, world: int, workers: Workers, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    workers.run(checkpoint_jobs.save_checkpoint, layout, world, *folders, tmp_path / "saved")
    description = describe_start(Model(encoder=Encoder(hf=folders[0]), llm=Component(hf=folders[1])))
    arch = description.architecture()
    parameters = CheckpointParameters(tmp_path / "saved" / "tensors")
    for component, folder in zip(("encoder", "llm"), folders, strict=True):
        source = hf_source(arch, component, folder)
        for row in component_rows(arch, component):
            name = f"{component}.{row.megatron}"
            found = parameters.read(name)
            assert found.shape == parameter_shape(arch, name)
            assert torch.equal(found, shard_of(row, source, 0, 1)), name


@pytest.mark.parametrize("name", ["siglip", "dinov2-giant-padded"])
def test_what_four_ranks_saved_comes_back_from_its_files(
    name: str, workers: Workers, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """More ranks than the head has key-value groups, and an MLP that is padded."""
    encoder, (_, layout, world) = make(name, tmp_path / "encoder"), matrix.TP4
    workers.run(checkpoint_jobs.save_checkpoint, layout, world, encoder, folders[1], tmp_path / "saved")
    export_checkpoint(tmp_path / "saved", "encoder", tmp_path / "export", "original", encoder)
    stored, found = (load_file(f / hf.WEIGHTS) for f in (encoder, tmp_path / "export"))
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[n], tensor) for n, tensor in stored.items())
    found = verify_checkpoint(tmp_path / "saved", encoder, folders[1])
    assert found.passed, found.table()


def test_an_import_loads_at_any_layout_and_verifies(
    workers: Workers, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    checkpoint = imported(tmp_path, *folders)
    wanted = workers.run(jobs.round_trip, Layout(), 1, *folders)[0]
    for _, layout, world in (matrix.TP2, matrix.PP2):
        for found in workers.run(checkpoint_jobs.loaded_checkpoint, layout, world, checkpoint):
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert verify_checkpoint(checkpoint, *folders).passed
