"""Checkpoints that are imported for a test, and whether two hold the same."""

from __future__ import annotations

from pathlib import Path

import torch

from pivot_megatron.convert.commands import import_checkpoint
from pivot_megatron.convert.plan import COMPONENTS, component_rows
from pivot_megatron.convert.store import describe
from pivot_megatron.convert.stream import CheckpointParameters


def imported(folder: Path, encoder: Path, head: Path, image_size: int | None = None) -> Path:
    import_checkpoint(encoder, head, folder / "checkpoint", None, 5, image_size)
    return folder / "checkpoint"


def same_parameters(one: Path, other: Path) -> bool:
    arch = describe(one).architecture()
    a, b = (CheckpointParameters(path / "tensors") for path in (one, other))
    names = [f"{part}.{row.megatron}" for part in COMPONENTS for row in component_rows(arch, part)]
    return all(torch.equal(a.read(name), b.read(name)) for name in names)
