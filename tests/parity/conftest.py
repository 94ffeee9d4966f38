"""Folders and checkpoints that several files of the parity tests begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from pivot_megatron.config.schema import AnyRes, Layout
from pivot_megatron.convert.commands import export_checkpoint, import_checkpoint
from tests.harness import Workers
from tests.parity import checkpoint_jobs
from tests.parity.reference import make_checkpoints


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_checkpoints(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def checkpoint(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("import") / "checkpoint"
    import_checkpoint(*folders, out, None, 5)
    return out


@pytest.fixture(scope="module")
def onevision(folders: tuple[Path, Path], workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onevision")
    tiles = AnyRes(grids=((1, 2), (2, 1)), max_tiles=2)
    workers.run(checkpoint_jobs.save_checkpoint, Layout(), 1, *folders, folder / "checkpoint", tiles)
    export_checkpoint(folder / "checkpoint", "mllm", folder / "mllm", "drop", None)
    return folder / "mllm"
