"""What users get wrong of an assembled model's folder: one line that names it, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.changes import configured, refused, tensors


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            ("image_grid_pinpoints", grids)
            for grids in ([32, 64], [[32]], [[32, 32, 32]], [["32", "64"]], "abc", {"a": 1}, [], [[0, 32]], [[-32, 32]])
        ),
        ("image_grid_pinpoints", [[32.0, 64.0]]),
        ("image_grid_pinpoints", [[32, 32]]),  # other than its image processor's
        ("vision_aspect_ratio", "anyres_max_0"),
        ("vision_aspect_ratio", "anyres_max_²"),
        ("vision_config", {"model_type": "junk"}),
        ("text_config", {"model_type": "llama"}),
    ],
)
def test_an_assembled_model(key: str, value: Any, onevision: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(onevision, tmp_path / "mllm")
    configured(**{key: value})(tmp_path / "mllm")
    out = tmp_path / "out"
    line = refused(capsys, out, "import", "--mllm", tmp_path / "mllm", "--out", out)
    assert key in line and str(tmp_path / "mllm") in line


def test_an_assembled_model_with_two_embeddings(onevision: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(onevision, tmp_path / "mllm")
    config = json.loads((onevision / "config.json").read_text())
    configured(tie_word_embeddings=False, text_config=config["text_config"] | {"tie_word_embeddings": True})(
        tmp_path / "mllm"
    )
    words = "language_model.model.embed_tokens.weight"
    tensors(lambda t: t.update({"language_model.lm_head.weight": t[words] + 1}))(tmp_path / "mllm")
    out = tmp_path / "out"
    assert "lm_head.weight" in refused(capsys, out, "import", "--mllm", tmp_path / "mllm", "--out", out)


def test_an_assembled_model_without_its_last_layer(onevision: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(onevision, tmp_path / "mllm")
    tensors(lambda t: [t.pop(name) for name in list(t) if "vision_tower" in name and ".layers.2." in name])(
        tmp_path / "mllm"
    )
    out, command = tmp_path / "out", ("import", "--mllm", tmp_path / "mllm", "--feature-layer", -2)
    assert "layers.2." in refused(capsys, out, *command, "--out", out)


def test_an_assembled_model_with_a_tensor_too_many(onevision: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(onevision, tmp_path / "mllm")
    name = "vision_tower.vision_model.encoder.layers.77.mlp.fc1.bias"
    tensors(lambda t: t.update({name: torch.zeros(3)}))(tmp_path / "mllm")
    out = tmp_path / "out"
    assert name in refused(capsys, out, "import", "--mllm", tmp_path / "mllm", "--out", out)
