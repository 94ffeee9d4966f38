"""What users get wrong, from the command line: one line that names it, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pivot_megatron.cli import main
from pivot_megatron.config.schema import AnyRes, Layout
from pivot_megatron.convert import hf
from pivot_megatron.convert.commands import export_checkpoint, import_checkpoint
from tests.harness import Workers
from tests.parity import jobs
from tests.parity.encoders import make
from tests.parity.reference import make_checkpoints

TILES = AnyRes(grids=((1, 2), (2, 1)), max_tiles=2)


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
    workers.run(jobs.save_checkpoint, Layout(), 1, *folders, folder / "checkpoint", TILES)
    export_checkpoint(folder / "checkpoint", "mllm", folder / "mllm", "drop", None)
    return folder / "mllm"


Change = Callable[[Path], object]


def configured(**keys: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    return change


def written(name: str, text: str | bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def changed(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    return changed


def indexed(extra: dict[str, str]) -> Change:
    def change(folder: Path) -> None:
        names = dict.fromkeys(load_file(folder / hf.WEIGHTS), hf.WEIGHTS)
        (folder / hf.INDEX).write_text(json.dumps({"weight_map": {**names, **extra}}))

    return change


def refused(capsys: pytest.CaptureFixture[str], out: Path, *command: object) -> str:
    """The one line that the command ends with; nothing stands where its output would."""
    before = sorted(out.parent.iterdir())
    assert main(["convert", *map(str, command)]) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("pivot: ")]
    assert sorted(out.parent.iterdir()) == before
    return line


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
}
HEADS: dict[str, tuple[Change, str]] = {
    "uneven groups": (configured(num_key_value_heads=3), "groups: expected a divisor of 4, found 3"),
    "rope": (configured(rope_parameters=[1]), "config.json: expected the numbers of a language model"),
}


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


def test_verify_names_another_architecture(checkpoint: Path, folders, tmp_path: Path, capsys) -> None:
    export_checkpoint(checkpoint, "encoder", tmp_path / "shorter", "drop", None)
    out = tmp_path / "out"
    assert "layers 4, found 3" in refused(capsys, out, "verify", checkpoint, "--encoder", tmp_path / "shorter")
    assert "family" in refused(capsys, out, "verify", checkpoint, "--encoder", make("siglip2", tmp_path / "native"))
    other = make_checkpoints(tmp_path / "other")[1]
    configured(vocab_size=384)(other)
    assert "vocabulary 320, found 384" in refused(capsys, out, "verify", checkpoint, "--llm", other)


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


def test_an_assembled_model_with_a_tensor_too_many(onevision: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(onevision, tmp_path / "mllm")
    name = "vision_tower.vision_model.encoder.layers.77.mlp.fc1.bias"
    tensors(lambda t: t.update({name: torch.zeros(3)}))(tmp_path / "mllm")
    out = tmp_path / "out"
    assert name in refused(capsys, out, "import", "--mllm", tmp_path / "mllm", "--out", out)


DAMAGE: dict[str, Change] = {
    "tensors cut off": lambda f: [cut(p) for p in (f / "tensors").glob("*.distcp")],
    "tensors gone": lambda f: [p.unlink() for p in (f / "tensors").glob("*.distcp")],
    "index cut off": lambda f: cut(f / "tensors" / ".metadata"),
    "index gone": lambda f: (f / "tensors" / ".metadata").unlink(),
    "facts missing": written("model.json", '{"format": 4}'),
}


def cut(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 3])


@pytest.mark.parametrize("case", DAMAGE)
def test_a_checkpoint(case: str, checkpoint: Path, folders, tmp_path: Path, capsys) -> None:
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    DAMAGE[case](tmp_path / "checkpoint")
    out = tmp_path / "out"
    line = refused(capsys, out, "export", tmp_path / "checkpoint", "--part", "encoder", "--out", out)
    assert "was the copy cut off?" in line
    line = refused(capsys, out, "verify", tmp_path / "checkpoint", "--encoder", folders[0])
    assert "was the copy cut off?" in line


def test_a_full_disk_leaves_no_import(folders: tuple[Path, Path], tmp_path: Path) -> None:
    def small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    command = ["convert", "import", "--encoder", folders[0], "--llm", folders[1], "--out", tmp_path / "out"]
    ended = subprocess.run(
        [sys.executable, "-m", "pivot_megatron.cli", *map(str, command)],
        preexec_fn=small_files_only,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2 and "cannot write" in ended.stderr and "Traceback" not in ended.stderr
    assert not list(tmp_path.iterdir())
