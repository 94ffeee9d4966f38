"""Tensors of several dtypes: an export rounds none, and verify tells those that were rounded from those that moved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pivot_megatron.cli import main
from pivot_megatron.convert import hf
from pivot_megatron.convert.commands import export_checkpoint
from pivot_megatron.convert.verify import verify_checkpoint
from tests.parity.changes import FC1, changed, tensors
from tests.parity.imported import imported


def in_dtype(folder: Path, dtype: torch.dtype, factor: float = 1.0) -> Path:
    """A folder's tensors, times `factor`, in another dtype. Its config.json stays."""
    tensors(lambda t: t.update({name: (tensor.float() * factor).to(dtype) for name, tensor in t.items()}))(folder)
    return folder


def test_verify_tells_rounded_weights_from_those_that_moved(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint coarser than its folder did not train; one that is finer, and rounds to it, did."""
    coarse, moved = (Path(shutil.copytree(folders[1], tmp_path / name)) for name in ("coarse", "moved"))
    in_dtype(coarse, torch.bfloat16)
    shutil.copyfile(coarse / hf.WEIGHTS, moved / hf.WEIGHTS)
    in_dtype(moved, torch.float32, factor=1 + 2e-5)
    assert main(["convert", "verify", str(imported(tmp_path / "a", folders[0], moved)), "--llm", str(coarse)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "0 tensors equal, bit for bit"
    assert sum("moved by less than bfloat16 shows" in line for line in said) == len(load_file(coarse / hf.WEIGHTS))
    command = ["convert", "verify", str(imported(tmp_path / "b", folders[0], coarse)), "--llm", str(folders[1])]
    assert main([*command, "--tolerance", "0.1"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "0 tensors equal, bit for bit"
    assert said[1].endswith("tensors equal once rounded to bfloat16, which the checkpoint holds them in")


def tensor_dtypes(folder: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(folder / hf.WEIGHTS).values()}


def test_an_export_rounds_nothing(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Whatever config.json says of its dtype: it may be as wrong as many are."""
    encoder, head = (Path(shutil.copytree(f, tmp_path / f.name)) for f in folders)
    for folder in (encoder, head):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    checkpoint = imported(tmp_path, encoder, head)
    for name, part, last, original in (
        ("drop", "encoder", "drop", None),
        ("whole", "encoder", "original", encoder),
        ("mllm", "mllm", "drop", None),
    ):
        export_checkpoint(checkpoint, part, tmp_path / name, last, original)  # type: ignore[arg-type]
        assert tensor_dtypes(tmp_path / name) == {torch.float32}
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert [c["dtype"] for c in (config, *(config.get(f"{x}_config", config) for x in ("vision", "text")))] == [
            "float32"
        ] * 3
    stored = load_file(encoder / hf.WEIGHTS)
    found = load_file(tmp_path / "whole" / hf.WEIGHTS)
    assert found.keys() == stored.keys() and all(torch.equal(found[name], stored[name]) for name in stored)
    assert verify_checkpoint(checkpoint, tmp_path / "drop", None, mllm=tmp_path / "mllm").passed


def test_what_trained_finer_than_the_original_stays_so(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """float32 weights of a run from a bfloat16 folder, and what of it did not train."""
    coarse, trained = (Path(shutil.copytree(folders[0], tmp_path / name)) for name in ("coarse", "trained"))
    in_dtype(coarse, torch.bfloat16)
    shutil.copyfile(coarse / hf.WEIGHTS, trained / hf.WEIGHTS)
    in_dtype(trained, torch.float32)
    tensors(lambda t: t.update({FC1: t[FC1] * (1 + 2e-5)}))(trained)
    moved = load_file(trained / hf.WEIGHTS)[FC1]
    checkpoint = imported(tmp_path, trained, folders[1])
    export_checkpoint(checkpoint, "encoder", tmp_path / "whole", "original", coarse)
    stored, found = load_file(coarse / hf.WEIGHTS), load_file(tmp_path / "whole" / hf.WEIGHTS)
    assert torch.equal(found.pop(FC1), moved)
    assert all(t.dtype == torch.bfloat16 and torch.equal(t, stored[name]) for name, t in found.items())
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["dtype"] == "float32"
    assert verify_checkpoint(checkpoint, tmp_path / "whole", None).passed


def test_parts_of_several_dtypes_are_put_together_in_the_finest(folders: tuple[Path, Path], tmp_path: Path) -> None:
    def coarse_queries(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {name: t.bfloat16() for name, t in tensors.items() if "q_proj" in name}

    encoder = changed(folders[0], tmp_path / "encoder", coarse_queries)
    checkpoint = imported(tmp_path, encoder, folders[1])
    assert verify_checkpoint(checkpoint, encoder, None).passed
    export_checkpoint(checkpoint, "encoder", tmp_path / "whole", "original", encoder)
    stored, found = load_file(encoder / hf.WEIGHTS), load_file(tmp_path / "whole" / hf.WEIGHTS)
    assert all(t.dtype == stored[name].dtype and torch.equal(t, stored[name]) for name, t in found.items())
