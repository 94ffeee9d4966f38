"""What users get wrong of an encoder or a head: one line that names it, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pivot_megatron.convert import hf
from pivot_megatron.convert.commands import import_checkpoint
from tests.parity.changes import Change, configured, no_last_layer, refused, tensors, written
from tests.parity.encoders import make


def indexed(extra: dict[str, str]) -> Change:
    def change(folder: Path) -> None:
        names = dict.fromkeys(load_file(folder / hf.WEIGHTS), hf.WEIGHTS)
        (folder / hf.INDEX).write_text(json.dumps({"weight_map": {**names, **extra}}))

    return change


def pickled(folder: Path, name: str) -> None:
    """Its tensors as torch.save has them; an index says so where it is no name of a safetensors file."""
    found = load_file(folder / hf.WEIGHTS)
    (folder / hf.WEIGHTS).unlink()
    torch.save(found, folder / name)
    if name != hf.WEIGHTS:
        (folder / hf.INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(found, name)}))


ENCODERS: dict[str, tuple[Change, str]] = {
    "empty index": (written(hf.INDEX, '{"weight_map": []}'), "weight_map"),
    "no weight map": (written(hf.INDEX, '{"metadata": {}}'), f"{hf.INDEX}: expected a weight_map"),
    "no such file": (indexed({"vision_model.x": "model-2.safetensors"}), "expected model-2.safetensors beside it"),
    "not in its file": (
        lambda f: (indexed({})(f), tensors(lambda t: t.pop("vision_model.encoder.layers.0.mlp.fc1.weight"))(f)),
        "layers.0.mlp.fc1.weight",
    ),
    "not UTF-8": (written("config.json", b'{"a": "\xff"}'), "config.json: not JSON"),
    "no layers": (configured(num_hidden_layers=None), "layers: expected a whole number above 0, found None"),
    "text": (configured(hidden_size="96"), "hidden: expected a whole number"),
    "no patches": (configured(patch_size=0), "patch_size: expected a whole number above 0, found 0"),
    "no heads": (configured(num_attention_heads=0), "heads: expected a whole number above 0, found 0"),
    "uneven heads": (configured(num_attention_heads=7), "heads: expected a divisor of 96, found 7"),
    "two sizes": (configured(image_size=[32, 32]), "image_size: expected a whole number"),
    "no vision": (configured(vision_config="x"), "config.json"),
    "processor": (
        written(hf.PROCESSOR, json.dumps({"size": {"height": 24, "width": 24}, "resample": 2, "do_normalize": False})),
        "resizes to 24 pixels",
    ),
    "pickle": (lambda f: (f / "model.safetensors").rename(f / "moco.pth.tar"), "moco.pth.tar is a pickle"),
    "pickle in the index": (lambda f: pickled(f, "pytorch_model.bin"), "pytorch_model.bin is a pickle"),
    "pickle by another name": (lambda f: pickled(f, hf.WEIGHTS), f"{hf.WEIGHTS} is a pickle"),
    "no last layer": (no_last_layer, "expected a tensor vision_model.encoder.layers.3."),
    "a layer too many": (configured(num_hidden_layers=5), "expected a tensor vision_model.encoder.layers.4."),
    "a layer too few": (configured(num_hidden_layers=3), "found a tensor vision_model.encoder.layers.3."),
    "dtype": (configured(dtype="junk"), "config.json: dtype: expected one of torch's, such as float32, found 'junk'"),
    "grey": (configured(num_channels=1), "num_channels: expected 3, red, green and blue, found 1"),
    "NaN": (configured(layer_norm_eps=float("nan")), "norm_epsilon: expected a number above 0, found nan"),
}
HEADS: dict[str, tuple[Change, str]] = {
    "uneven groups": (configured(num_key_value_heads=3), "groups: expected a divisor of 4, found 3"),
    "rope": (configured(rope_parameters=[1]), "config.json: expected the numbers of a language model"),
    "theta": (configured(rope_parameters={"rope_theta": float("nan")}), "rope_theta: expected a number above 0"),
    "activation": (configured(hidden_act="gelu"), "hidden_act: expected silu, found gelu"),
    "sliding": (configured(layer_types=["sliding_attention"] * 4), "layer_types: full attention only is supported"),
    "two embeddings": (
        tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})),
        "lm_head.weight: expected model.embed_tokens.weight again",
    ),
}


def processed(**keys: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / hf.PROCESSOR
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    return change


def timms(**keys: Any) -> Change:
    """timm's image processor stands in config.json."""
    told = {"input_size": [3, 32, 32], "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}
    return configured(pretrained_cfg=told | keys)


# By family: what differs in one alone.
FAMILIES: dict[str, tuple[str, Change, str]] = {
    "ratio": ("dinov2", configured(mlp_ratio="4"), "mlp_ratio: expected a number above 0, found '4'"),
    "timm's ratio": ("moco", configured(model_args={"embed_dim": 96, "mlp_ratio": "2"}), "model_args: mlp_ratio"),
    "timm's filter": ("moco", timms(interpolation="lanczos"), "expected resample 2 (bilinear) or 3 (bicubic)"),
    "timm's size": (
        "moco",
        timms(input_size=32),
        "pretrained_cfg: expected an input_size [3, height, width], found 32",
    ),
    "timm's other size": ("moco", timms(input_size=[3, 64, 64]), "resizes to 64 pixels"),
    "timm's processor": ("moco", configured(pretrained_cfg="x"), "pretrained_cfg"),
    **{
        f"NaFlex, {most}": (
            "siglip2",
            processed(max_num_patches=most),
            "max_num_patches: expected a whole number above 0",
        )
        for most in ("x", 0, -3)
    },
}


@pytest.mark.parametrize("case", FAMILIES)
def test_a_family(case: str, folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, change, said = FAMILIES[case]
    change(make(name, tmp_path / "encoder"))
    out = tmp_path / "out"
    line = refused(capsys, out, "import", "--encoder", tmp_path / "encoder", "--llm", folders[1], "--out", out)
    assert said in line


@pytest.mark.parametrize("case", ENCODERS)
def test_an_encoder(case: str, folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, said = ENCODERS[case]
    shutil.copytree(folders[0], tmp_path / "encoder")
    change(tmp_path / "encoder")
    out = tmp_path / "out"
    line = refused(capsys, out, "import", "--encoder", tmp_path / "encoder", "--llm", folders[1], "--out", out)
    assert said in line


@pytest.mark.parametrize("case", HEADS)
def test_a_head(case: str, folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, said = HEADS[case]
    shutil.copytree(folders[1], tmp_path / "head")
    change(tmp_path / "head")
    out = tmp_path / "out"
    line = refused(capsys, out, "import", "--encoder", folders[0], "--llm", tmp_path / "head", "--out", out)
    assert said in line


def test_a_second_copy_of_tied_embeddings_is_no_other_head(folders: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(folders[1], tmp_path / "head")
    tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))(tmp_path / "head")
    import_checkpoint(folders[0], tmp_path / "head", tmp_path / "out", None, 5)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--image-size", -32, "found -32"),
        ("--image-size", 0, "found 0"),
        ("--image-size", 4, "a patch of 8 pixels at least, found 4"),
        ("--feature-layer", 0, "feature_layer"),
        ("--feature-layer", 3, "feature_layer"),
        ("--feature-layer", -9, "feature_layer"),
    ],
)
def test_an_option(option: str, value: int, said: str, folders, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    command = ("import", "--encoder", folders[0], "--llm", folders[1], "--out", out, f"{option}={value}")
    assert said in refused(capsys, out, *command)


@pytest.mark.parametrize("name", ["none", "broken"])
def test_a_tokenizer(name: str, folders: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    head = tmp_path / "head"
    shutil.copytree(folders[1], head)
    for file in hf.TOKENIZER_FILES:
        (head / file).unlink(missing_ok=True)
    if name == "broken":
        (head / "tokenizer.json").write_text("{")
    import_checkpoint(folders[0], head, tmp_path / "checkpoint", None, 5)
    out = tmp_path / "out"
    line = refused(capsys, out, "export", tmp_path / "checkpoint", "--part", "mllm", "--out", out)
    assert "expected a tokenizer" in line
