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

from pivot_megatron.checkpoints.folder import FORMAT
from pivot_megatron.cli import main
from pivot_megatron.config.schema import AnyRes, Layout
from pivot_megatron.convert import hf
from pivot_megatron.convert.commands import export_checkpoint, import_checkpoint
from tests.checkpoints import flip
from tests.dist.runs import config_tree, make_world, train_error, write_config
from tests.harness import Workers
from tests.parity import checkpoint_jobs
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
    workers.run(checkpoint_jobs.save_checkpoint, Layout(), 1, *folders, folder / "checkpoint", TILES)
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
    "pickle in the index": (lambda f: pickled(f, "pytorch_model.bin"), "pytorch_model.bin is a pickle"),
    "pickle by another name": (lambda f: pickled(f, hf.WEIGHTS), f"{hf.WEIGHTS} is a pickle"),
    "no last layer": (
        tensors(lambda t: [t.pop(name) for name in list(t) if ".layers.3." in name]),
        "expected a tensor vision_model.encoder.layers.3.",
    ),
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


def test_a_config_that_the_library_does_not_read(checkpoint: Path, tmp_path: Path, capsys) -> None:
    """Of a checkpoint, whose own numbers are sound."""
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    configured(attention_dropout="much")(tmp_path / "checkpoint" / "hf" / "encoder")
    out = tmp_path / "out"
    line = refused(capsys, out, "export", tmp_path / "checkpoint", "--part", "encoder", "--out", out)
    assert "config.json: expected" in line and "bytes, found" in line  # a checkpoint knows its files


def test_a_second_copy_of_tied_embeddings_is_no_other_head(folders: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(folders[1], tmp_path / "head")
    tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))(tmp_path / "head")
    import_checkpoint(folders[0], tmp_path / "head", tmp_path / "out", None, 5)


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
    ENCODERS["no last layer"][0](tmp_path / "encoder")
    original = ("--last-layer", "original", "--original", tmp_path / "encoder")
    out = tmp_path / "out"
    line = refused(capsys, out, "export", checkpoint, "--part", "encoder", "--out", out, *original)
    assert "expected a tensor vision_model.encoder.layers.3." in line


def pickled(folder: Path, name: str) -> None:
    """Its tensors as torch.save has them; an index says so where it is no name of a safetensors file."""
    found = load_file(folder / hf.WEIGHTS)
    (folder / hf.WEIGHTS).unlink()
    torch.save(found, folder / name)
    if name != hf.WEIGHTS:
        (folder / hf.INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(found, name)}))


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


DAMAGE: dict[str, Change] = {
    "tensors cut off": lambda f: [cut(p) for p in (f / "tensors").glob("*.distcp")],
    "tensors gone": lambda f: [p.unlink() for p in (f / "tensors").glob("*.distcp")],
    "index cut off": lambda f: cut(f / "tensors" / ".metadata"),
    "index gone": lambda f: (f / "tensors" / ".metadata").unlink(),
    "facts missing": written("model.json", f'{{"format": {FORMAT}}}'),
    "list gone": lambda f: (f / "files.json").unlink(),
    "list cut off": lambda f: cut(f / "files.json"),
    "config gone": lambda f: (f / "hf" / "encoder" / "config.json").unlink(),
}
# What the files themselves cannot tell, and what an export has no need of.
MORE_DAMAGE: dict[str, tuple[Change, str]] = {
    "tensors": (lambda f: flip(next((f / "tensors").glob("*.distcp")), -40_000), ".distcp: expected CRC-32"),
    "index": (lambda f: flip(f / "tensors" / ".metadata", 300), ".metadata: expected CRC-32"),
    "common state": (lambda f: flip(f / "tensors" / "common.pt", 100), "common.pt: expected CRC-32"),
    "common state gone": (lambda f: (f / "tensors" / "common.pt").unlink(), "common.pt: expected"),
    "facts": (lambda f: flip(f / "model.json", -20), "model.json: expected CRC-32"),
    "tokenizer": (lambda f: flip(f / "hf" / "llm" / "tokenizer.json", 1000), "tokenizer.json: expected CRC-32"),
    "an older format": (lambda f: told(f, format=4), f"checkpoint format 4, this version reads {FORMAT}"),
}


def told(folder: Path, **facts: Any) -> None:
    path = folder / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


@pytest.mark.parametrize("case", MORE_DAMAGE)
def test_one_bit_of_a_checkpoint(case: str, checkpoint: Path, folders, tmp_path: Path, capsys) -> None:
    change, said = MORE_DAMAGE[case]
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    change(tmp_path / "checkpoint")
    line = refused(capsys, tmp_path / "out", "verify", tmp_path / "checkpoint", "--encoder", folders[0])
    assert said in line
    line = refused(
        capsys, tmp_path / "out", "export", tmp_path / "checkpoint", "--part", "mllm", "--out", tmp_path / "out"
    )
    assert said in line


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


def on_a_full_disk(most: int, *command: object) -> str:
    """What `pivot convert` says where no file may have more than `most` bytes."""
    ended = subprocess.run(
        [sys.executable, "-m", "pivot_megatron.cli", "convert", *map(str, command)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    (line,) = [text for text in ended.stderr.splitlines() if text.startswith("pivot: ")]
    return line


@pytest.mark.parametrize("most", [200_000, 3000], ids=["tensors", "tokenizer"])
def test_a_full_disk_leaves_no_import(most: int, folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = on_a_full_disk(most, "import", "--encoder", folders[0], "--llm", folders[1], "--out", out)
    assert line.startswith(f"pivot: {out}: cannot write") and str(folders[1]) not in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("most", [200_000, 3000], ids=["tensors", "tokenizer"])
def test_a_full_disk_leaves_no_export(most: int, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = on_a_full_disk(most, "export", checkpoint, "--part", "mllm", "--out", out)
    assert "cannot write (" in line and "is the disk full?" in line
    assert not list(tmp_path.iterdir())


def test_folders_that_stand_beside_the_output_stay(
    checkpoint: Path, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    for name in ("import.part", "export.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    import_checkpoint(*folders, tmp_path / "import", None, 5)
    export_checkpoint(checkpoint, "encoder", tmp_path / "export", "drop", None)
    assert all((tmp_path / name / "mine").exists() for name in ("import.part", "export.part"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export", "export.part", "import", "import.part"]


def test_what_a_killed_export_left_is_removed(checkpoint: Path, tmp_path: Path) -> None:
    (hf.place_beside(tmp_path / "out") / "half").mkdir(parents=True)
    export_checkpoint(checkpoint, "encoder", tmp_path / "out", "drop", None)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
