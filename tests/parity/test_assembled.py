"""Encoder, projector and head as one folder of transformers, and back: LLaVA, its answers, and what verify says of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from pivot_megatron.convert.commands import export_checkpoint, import_assembled
from pivot_megatron.convert.store import describe
from pivot_megatron.convert.verify import verify_checkpoint
from pivot_megatron.data.build import load_tokenizer
from pivot_megatron.data.chat import qwen_1_5
from pivot_megatron.data.images import decode_rgb
from pivot_megatron.data.sample import Pair
from pivot_megatron.data.tokens import SampleTokenizer
from pivot_megatron.data.views import pixels_of
from pivot_megatron.errors import UserError
from pivot_megatron.recipe.answers import ExportedModel
from tests import matrix
from tests.harness import Workers
from tests.parity import checkpoint_jobs
from tests.parity.changes import changed
from tests.parity.encoders import make
from tests.parity.imported import imported, same_parameters
from tests.unit.test_views import noise


@pytest.mark.parametrize("name", ["siglip", "clip"])
def test_an_assembled_model_and_back(name: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint = imported(tmp_path, make(name, tmp_path / "encoder"), folders[1])
    export_checkpoint(checkpoint, "mllm", tmp_path / "llava", "drop", None)
    import_assembled(tmp_path / "llava", tmp_path / "again", None)
    assert same_parameters(checkpoint, tmp_path / "again")
    assert_verified(tmp_path / "again", tmp_path / "llava")
    # As transformers itself saves it: other names, another place for the image processor.
    LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava").save_pretrained(tmp_path / "saved")
    for file in (tmp_path / "llava").iterdir():
        if file.suffix != ".safetensors" and file.name != "config.json":
            shutil.copyfile(file, tmp_path / "saved" / file.name)
    import_assembled(tmp_path / "saved", tmp_path / "third", None)
    assert same_parameters(checkpoint, tmp_path / "third")


@pytest.mark.parametrize("name", ["siglip", "clip"])
def test_greedy_answers_are_transformers_own(
    name: str, folders: tuple[Path, Path], workers: Workers, tmp_path: Path
) -> None:
    checkpoint = imported(tmp_path, make(name, tmp_path / "encoder"), folders[1])
    export_checkpoint(checkpoint, "mllm", tmp_path / "llava", "drop", None)
    description = describe(checkpoint)
    views, pair = description.image_views(), Pair("k", noise(50, 40), "what colour is it", "red", "blue", {})
    sample = SampleTokenizer(load_tokenizer(description.llm), qwen_1_5, views.fixed, 2048, 2, "drop")(pair)
    exported = ExportedModel(tmp_path / "llava")
    prompt = exported.prompt(pair.question)
    inputs = exported.processor(images=decode_rgb(noise(50, 40)), text=prompt, return_tensors="pt")
    pixels = pixels_of(views, noise(50, 40), "pil")
    with torch.no_grad():
        whole = exported.model.generate(**inputs, do_sample=False, max_new_tokens=12, eos_token_id=None)[0]
    wanted = whole[inputs["input_ids"].shape[1] :].tolist()
    for _, layout, world in (matrix.SINGLE, matrix.TP2):
        assert workers.run(checkpoint_jobs.greedy, layout, world, checkpoint, sample, [pixels], 12) == [wanted] * world


def assert_verified(checkpoint: Path, mllm: Path) -> None:
    """Every tensor and layer, and that another projector is seen, in its tensor and in what comes after it."""
    found = verify_checkpoint(checkpoint, None, None, mllm=mllm)
    assert found.passed, found.table()
    said = {check.what for check in found.checks}
    assert "tensor multi_modal_projector.linear_1.weight" in said and {"head layer 0", "head log-probs"} <= said
    other = changed(mllm, mllm.with_name("changed"), move_projector)
    failed = {c.what for c in verify_checkpoint(checkpoint, None, None, mllm=other).checks if not c.passed}
    assert {"tensor multi_modal_projector.linear_1.bias", "head layer 0"} <= failed


def move_projector(tensors: dict[str, torch.Tensor]) -> None:
    tensors[next(n for n in tensors if n.endswith("multi_modal_projector.linear_1.bias"))] += 0.1


@pytest.mark.parametrize("name", ["siglip", "clip"])
def test_verify_takes_a_checkpoints_own_exports(name: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Of as many layers as the checkpoint has; and the folder that it began from, of more."""
    encoder = make(name, tmp_path / "encoder")
    checkpoint = imported(tmp_path, encoder, folders[1])
    for part, out in (("encoder", "drop"), ("mllm", "llava")):
        export_checkpoint(checkpoint, part, tmp_path / out, "drop", None)  # type: ignore[arg-type]
    layers = [f"encoder layer {n}" for n in range(3)]
    for folder in (encoder, tmp_path / "drop"):
        found = verify_checkpoint(checkpoint, folder, None)
        assert found.passed, found.table()
        assert [check.what for check in found.checks if not check.what.startswith("tensor ")] == layers
    assert_verified(checkpoint, tmp_path / "llava")


@pytest.mark.parametrize("name", ["siglip", "clip"])
def test_verify_of_an_assembled_model_at_another_resolution(
    name: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """Positions are interpolated there as transformers is called, here once."""
    checkpoint = imported(tmp_path, make(name, tmp_path / "encoder"), folders[1])
    export_checkpoint(checkpoint, "mllm", tmp_path / "llava", "drop", None)
    import_assembled(tmp_path / "llava", tmp_path / "larger", None, image_size=48)
    assert describe(tmp_path / "larger").architecture().encoder.image_size == 48
    assert_verified(tmp_path / "larger", tmp_path / "llava")
    export_checkpoint(tmp_path / "larger", "mllm", tmp_path / "larger-llava", "drop", None)
    found = verify_checkpoint(tmp_path / "larger", None, None, mllm=tmp_path / "larger-llava")
    assert found.passed, found.table()


def test_verify_of_an_assembled_model_at_other_features(folders: tuple[Path, Path], tmp_path: Path) -> None:
    export_checkpoint(imported(tmp_path, *folders), "mllm", tmp_path / "llava", "drop", None)
    import_assembled(tmp_path / "llava", tmp_path / "earlier", -2)
    found = verify_checkpoint(tmp_path / "earlier", None, None, mllm=tmp_path / "llava")
    assert found.passed, found.table()


def test_features_past_a_final_norm_are_no_llava(folders: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint = imported(tmp_path, make("dinov2", tmp_path / "encoder"), folders[1])
    with pytest.raises(UserError, match="past the final norm"):
        export_checkpoint(checkpoint, "mllm", tmp_path / "llava", "drop", None)
    assert not (tmp_path / "llava").exists()
