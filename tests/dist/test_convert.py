"""`pivot convert` from folder to folder, as a user calls it."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration, PreTrainedModel, SiglipVisionModel

from pivot_megatron.cli import main
from pivot_megatron.data.chat import qwen_1_5
from pivot_megatron.data.sample import Turn
from tests.parity.reference import make_checkpoints, make_pixels

TOOLS = Path(__file__).parents[2] / "tools" / "convert"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(encoder, head, imported checkpoint)."""
    folder = tmp_path_factory.mktemp("convert")
    encoder, head = make_checkpoints(folder)
    arguments = ["--encoder", str(encoder), "--llm", str(head), "--out", str(folder / "imported")]
    assert main(["convert", "import", *arguments]) == 0
    return encoder, head, folder / "imported"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_verify_passes_what_was_imported(folders, capsys) -> None:
    encoder, head, imported = folders
    assert main(["convert", "verify", str(imported), "--encoder", str(encoder), "--llm", str(head)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("tensors equal, bit for bit")
    assert [line[:4] for line in lines[1:]] == ["ok  "] * 8  # three encoder layers, the head's four and its log-probs


@pytest.mark.parametrize("tamper", ["swap", "transpose", "bias", "layer"])
def test_verify_catches_other_weights(folders, tmp_path: Path, capsys, tamper: str) -> None:
    encoder, head, imported = folders
    other = tmp_path / "encoder"
    shutil.copytree(encoder, other)
    tensors, layer = weights(encoder), "vision_model.encoder.layers.1."
    query, key = f"{layer}self_attn.q_proj.weight", f"{layer}self_attn.k_proj.weight"
    if tamper == "swap":
        tensors[query], tensors[key] = tensors[key], tensors[query]
    elif tamper == "transpose":
        tensors[query] = tensors[query].T.contiguous()
    elif tamper == "bias":
        tensors[f"{layer}mlp.fc1.bias"].zero_()
    else:
        for name in [n for n in tensors if n.startswith(layer)]:
            tensors[name] = tensors[name.replace("layers.1.", "layers.2.")].clone()
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert main(["convert", "verify", str(imported), "--encoder", str(other), "--llm", str(head)]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert any(line.startswith(f"FAIL tensor {layer}") for line in failed)
    assert any(line.startswith("FAIL encoder layer 1") for line in failed)


def test_original_export_is_the_folder_again(folders, tmp_path: Path) -> None:
    """Nothing trained, so every tensor comes back, the last layer and the pooling head too."""
    encoder, _, imported = folders
    arguments = ["--part", "encoder", "--last-layer", "original", "--original", str(encoder), "--out", str(tmp_path / "x")]
    assert main(["convert", "export", str(imported), *arguments]) == 0
    found, wanted = weights(tmp_path / "x"), weights(encoder)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert json.loads((tmp_path / "x" / "pivot_export.json").read_text())["features"] == "hidden_states[-2]"


def exported_to(out: Path, checkpoint: Path, part: str, theirs: type[PreTrainedModel]) -> Any:
    """The exported part as its library loads it, every tensor in its place."""
    assert main(["convert", "export", str(checkpoint), "--part", part, "--out", str(out)]) == 0
    model, info = theirs.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model


def test_dropped_export_gives_the_same_features(folders, tmp_path: Path) -> None:
    encoder, _, imported = folders
    out = tmp_path / "x"
    exported = exported_to(out, imported, "encoder", SiglipVisionModel)
    original = SiglipVisionModel.from_pretrained(encoder)
    pixels = make_pixels(2, seed=1)
    with torch.no_grad():
        found = exported.eval()(pixel_values=pixels, output_hidden_states=True).hidden_states
        wanted = original.eval()(pixel_values=pixels, output_hidden_states=True).hidden_states
    assert len(found) == len(wanted) - 1 and torch.equal(found[-1], wanted[-2])
    assert (out / "preprocessor_config.json").read_bytes() == (encoder / "preprocessor_config.json").read_bytes()


def test_assembled_export_asks_as_the_run_was_trained(folders, tmp_path: Path) -> None:
    _, head, imported = folders
    out = tmp_path / "x"
    model = exported_to(out, imported, "mllm", LlavaForConditionalGeneration)
    processor = AutoProcessor.from_pretrained(out)
    message = {"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": "image"}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    assert text == qwen_1_5([Turn("user", "<image>\nWhat is it?")])[0].text + qwen_1_5([Turn("user", "<image>\nWhat is it?")])[1].text
    inputs = processor(text=text, images=Image.new("RGB", (40, 30)), return_tensors="pt")
    token = model.config.image_token_id
    assert token == len(processor.tokenizer) - 1 >= json.loads((head / "config.json").read_text())["vocab_size"] - 64
    assert int((inputs["input_ids"] == token).sum()) == 16
    assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "{imported}", "--part", "encoder", "--out", "{encoder}"], "already has files in it"),
        (["export", "{imported}", "--part", "encoder", "--last-layer", "original", "--out", "{new}"], "needs --original"),
        (["export", "{encoder}", "--part", "encoder", "--out", "{new}"], "expected a checkpoint or a run's folder"),
        (["import", "--encoder", "{head}", "--llm", "{head}", "--out", "{new}"], "expected a vision encoder"),
        (["import", "--encoder", "{new}", "--llm", "{head}", "--out", "{new}2"], "no such file"),
        (["import", "--encoder", "{cut}", "--llm", "{head}", "--out", "{new}"], "not a whole safetensors file"),
        (["import", "--encoder", "{lacking}", "--llm", "{head}", "--out", "{new}"], "expected a tensor"),
    ],
)
def test_mistakes_are_one_line(folders, tmp_path: Path, capsys, arguments: list[str], message: str) -> None:
    encoder, head, imported = folders
    for name in ("cut", "lacking"):
        shutil.copytree(encoder, tmp_path / name)
    whole = (encoder / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(whole[:-100])
    tensors = weights(encoder)
    del tensors["vision_model.encoder.layers.0.mlp.fc2.bias"]
    save_file(tensors, tmp_path / "lacking" / "model.safetensors")
    names = {"encoder": encoder, "head": head, "imported": imported, "new": tmp_path / "new"}
    names |= {name: tmp_path / name for name in ("cut", "lacking")}
    assert main(["convert", *(a.format(**names) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1 and error.startswith("pivot: ")
    assert not (tmp_path / "new").exists()


def test_a_conversion_is_measured(tmp_path: Path, capsys) -> None:
    assert main(["bench", "convert", "--head", "tiny", "--out", str(tmp_path / "bench"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["exact"] and found["head"] == "tiny"
    assert min(found[f"{what}_seconds"] for what in ("copy", "import", "export")) > 0
    assert found["largest_tensor"] < found["bytes"] < min(found["peak_import"], found["peak_export"])


def test_scripts_are_the_same_commands(folders, tmp_path: Path, monkeypatch) -> None:
    encoder, head, imported = folders

    def run(script: str, *arguments: str) -> object:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOLS / script), run_name="__main__")
        return ended.value.code

    again = str(tmp_path / "again")
    assert run("hf_to_megatron.py", "--encoder", str(encoder), "--llm", str(head), "--out", again) == 0
    assert run("megatron_to_hf.py", again, "--part", "encoder", "--out", str(tmp_path / "out")) == 0
    wanted = weights(encoder)
    same = [n for n, t in weights(tmp_path / "out").items() if torch.equal(t, wanted[n])]
    assert len(same) == sum(1 for n in wanted if "layers." in n and "layers.3." not in n) + 3
