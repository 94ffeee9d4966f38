"""Changes to a model's folder that make it another or a wrong one, and what the command line then says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pivot_megatron.cli import main

Change = Callable[[Path], object]

FC1 = "vision_model.encoder.layers.0.mlp.fc1.weight"


def configured(**keys: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    return change


def written(name: str, text: str | bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def rewrite(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    return rewrite


def changed(folder: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of `folder` with other tensors."""
    shutil.copytree(folder, out)
    tensors(change)(out)
    return out


no_last_layer = tensors(lambda t: [t.pop(name) for name in list(t) if ".layers.3." in name])


def refused(capsys: pytest.CaptureFixture[str], out: Path, *command: object) -> str:
    """The one line that the command ends with; nothing stands where its output would."""
    before = sorted(out.parent.iterdir())
    assert main(["convert", *map(str, command)]) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("pivot: ")]
    assert sorted(out.parent.iterdir()) == before
    return line
