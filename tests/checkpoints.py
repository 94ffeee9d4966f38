"""Checkpoint folders for tests: damaged, changed on purpose, or with nothing in them but what a policy reads."""

from __future__ import annotations

import json
from pathlib import Path

from pivot_megatron.checkpoints.folder import FORMAT, Saved, step_folder
from pivot_megatron.checkpoints.manifest import MANIFEST, Manifest, sum_file


def list_again(checkpoint: Path) -> None:
    """As if its files had been written as they are."""
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST]
    Manifest({path.relative_to(checkpoint).as_posix(): sum_file(path) for path in files}).write(checkpoint)


def flip(path: Path, at: int) -> None:
    """One bit of the byte at `at`, from the end where that is negative."""
    whole = bytearray(path.read_bytes())
    whole[at] ^= 4
    path.write_bytes(whole)


def hollow(folder: Path, step: int, due: int | None = None, **metrics: float) -> Path:
    """A run's checkpoint, but for the tensors and the model."""
    out = step_folder(folder, step)
    (out / "tensors").mkdir(parents=True)
    (out / "model.json").write_text(json.dumps({"format": FORMAT, "id": "0"}))
    (out / "tensors" / "__0_0.distcp").write_bytes(bytes(range(100)))
    layout = {"tensor": 1, "pipeline": 2, "world": 4}
    Saved(step, step if due is None else due, "2026-01-02T03:04:05+00:00", layout, metrics).write(out)
    list_again(out)
    return out
