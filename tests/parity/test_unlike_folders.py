"""Folders that do not fit the checkpoint that they are held against, or that a run begins with: said by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from pivot_megatron.cli import main
from pivot_megatron.config.schema import Layout
from pivot_megatron.convert.commands import export_checkpoint, import_checkpoint
from tests.dist.runs import config_tree, make_world, train_error, write_config
from tests.harness import Workers
from tests.parity.changes import configured, no_last_layer, refused, tensors
from tests.parity.encoders import make
from tests.parity.reference import make_checkpoints

EXTRA = "vision_model.encoder.layers.9.mlp.fc1.bias"


def test_verify_names_a_tensor_too_many(checkpoint: Path, folders, tmp_path: Path, capsys) -> None:
    shutil.copytree(folders[0], tmp_path / "encoder")
    tensors(lambda t: t.update({EXTRA: torch.zeros(3)}))(tmp_path / "encoder")
    assert EXTRA in refused(capsys, tmp_path / "out", "verify", checkpoint, "--encoder", tmp_path / "encoder")


def test_a_run_names_a_tensor_too_many(workers: Workers, tmp_path: Path) -> None:
    make_world(tmp_path / "world", pairs=12)
    tensors(lambda t: t.update({EXTRA: torch.zeros(3)}))(tmp_path / "world" / "encoder")
    config = write_config(tmp_path / "config.yaml", config_tree(tmp_path / "world", tmp_path / "run"))
    assert EXTRA in workers.run(train_error, None, 1, config, Layout())[0]


def test_the_original_of_an_export_is_whole(checkpoint: Path, folders, tmp_path: Path, capsys) -> None:
    shutil.copytree(folders[0], tmp_path / "encoder")
    no_last_layer(tmp_path / "encoder")
    original = ("--last-layer", "original", "--original", tmp_path / "encoder")
    out = tmp_path / "out"
    line = refused(capsys, out, "export", checkpoint, "--part", "encoder", "--out", out, *original)
    assert "expected a tensor vision_model.encoder.layers.3." in line


def test_verify_names_another_architecture(checkpoint: Path, folders, onevision: Path, tmp_path: Path, capsys) -> None:
    import_checkpoint(*folders, tmp_path / "early", -3, 5)
    export_checkpoint(tmp_path / "early", "encoder", tmp_path / "shorter", "drop", None)
    out = tmp_path / "out"
    assert "layers 4, found 2" in refused(capsys, out, "verify", checkpoint, "--encoder", tmp_path / "shorter")
    assert "family" in refused(capsys, out, "verify", checkpoint, "--encoder", make("siglip2", tmp_path / "native"))
    other = make_checkpoints(tmp_path / "other")[1]
    configured(vocab_size=384)(other)
    assert "vocabulary 320, found 384" in refused(capsys, out, "verify", checkpoint, "--llm", other)
    assert "Architecture(" not in refused(capsys, out, "verify", checkpoint, "--mllm", onevision)


def test_verify_of_a_wrong_shape_says_which(checkpoint: Path, folders, tmp_path: Path, capsys) -> None:
    shutil.copytree(folders[0], tmp_path / "encoder")
    name = "vision_model.encoder.layers.1.mlp.fc1.bias"
    tensors(lambda t: t.update({name: torch.zeros(3)}))(tmp_path / "encoder")
    assert main(["convert", "verify", str(checkpoint), "--encoder", str(tmp_path / "encoder")]) == 1
    assert f"FAIL tensor {name}" in capsys.readouterr().out


def test_exports_that_cannot_be(checkpoint: Path, folders, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    import_checkpoint(make("vit", tmp_path / "vit"), folders[1], tmp_path / "early", -2, 5)
    assert "SigLIP and CLIP alone" in refused(capsys, out, "export", tmp_path / "early", "--part", "mllm", "--out", out)
    other = make_checkpoints(tmp_path / "wider")[0]
    configured(intermediate_size=128)(other)
    original = ("--last-layer", "original", "--original", other)
    assert "ffn 176, found 128" in refused(
        capsys, out, "export", checkpoint, "--part", "encoder", "--out", out, *original
    )
    mllm = ("export", checkpoint, "--part", "mllm", "--out", out, "--last-layer", "original", "--original", folders[0])
    assert "--original" in refused(capsys, out, *mllm)
