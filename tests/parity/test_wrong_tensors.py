"""Tensors that are not what their folder says: import names them, and verify sees what was tampered with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from pivot_megatron.cli import main
from pivot_megatron.convert.commands import import_checkpoint
from pivot_megatron.convert.verify import verify_checkpoint
from pivot_megatron.errors import UserError
from tests.parity.changes import FC1, changed
from tests.parity.imported import imported

WRONG = {
    "missing": (lambda t: t.pop(FC1), f"expected a tensor {FC1}"),
    "shape": (lambda t: t.update({FC1: t[FC1][:-1].clone()}), f"{FC1}: expected shape"),
    "extra": (
        lambda t: t.update({"vision_model.encoder.layers.9.mlp.fc1.bias": torch.zeros(3)}),
        "layers.9.mlp.fc1.bias",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tensors_are_named(case: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    change, said = WRONG[case]
    encoder, out = changed(folders[0], tmp_path / "encoder", change), tmp_path / "out"
    with pytest.raises(UserError, match=said):
        import_checkpoint(encoder, folders[1], out, None, 5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["encoder"]


def test_a_file_cut_off_is_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    encoder = tmp_path / "encoder"
    shutil.copytree(folders[0], encoder)
    whole = (encoder / "model.safetensors").read_bytes()
    (encoder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors: not a whole safetensors file"):
        import_checkpoint(encoder, folders[1], tmp_path / "out", None, 5)


def test_a_pickle_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    encoder = tmp_path / "encoder"
    shutil.copytree(folders[0], encoder)
    (encoder / "model.safetensors").rename(encoder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle"):
        import_checkpoint(encoder, folders[1], tmp_path / "out", None, 5)


TAMPERED = {
    "swapped": lambda t: swap(t, "self_attn.q_proj.weight", "self_attn.k_proj.weight"),
    "transposed": lambda t: t.update({key(t, "out_proj.weight"): t[key(t, "out_proj.weight")].t().contiguous()}),
    "shifted": lambda t: swap(t, "layers.0.layer_norm1.weight", "layers.1.layer_norm1.weight"),
    "no bias": lambda t: t[key(t, "mlp.fc1.bias")].zero_(),
}


def key(tensors: dict[str, torch.Tensor], part: str) -> str:
    return next(name for name in tensors if part in name)


def swap(tensors: dict[str, torch.Tensor], one: str, other: str) -> None:
    a, b = key(tensors, one), key(tensors, other)
    tensors[a], tensors[b] = tensors[b], tensors[a]


@pytest.mark.parametrize("case", TAMPERED)
def test_verify_sees_what_was_tampered_with(case: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint = imported(tmp_path, changed(folders[0], tmp_path / "encoder", TAMPERED[case]), folders[1])
    found = verify_checkpoint(checkpoint, folders[0], None)
    assert not found.passed
    wrong = [check.what for check in found.checks if not check.passed]
    assert any(what.startswith("tensor ") for what in wrong)
    assert any(what.startswith("encoder layer") for what in wrong)
    assert main(["convert", "verify", str(checkpoint), "--encoder", str(folders[0])]) == 1
    assert main(["convert", "verify", str(checkpoint), "--llm", str(folders[1])]) == 0
