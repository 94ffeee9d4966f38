"""Qwen3 as a head: a file of its own, the same comparisons."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM

from pivot_megatron.config.schema import Dpo
from pivot_megatron.convert.commands import export_checkpoint, import_assembled, import_checkpoint
from pivot_megatron.convert.tiny_checkpoints import make_tokenizer
from pivot_megatron.convert.verify import verify_checkpoint
from tests import matrix
from tests.harness import Workers
from tests.parity import checkpoint_jobs, jobs, training_jobs
from tests.parity.imported import same_parameters
from tests.parity.reference import CORPUS, make_checkpoints, randomise
from tests.parity.test_training import check, reference_training, shares

OBJECTIVE = Dpo(beta=0.3)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("qwen3")
    encoder, _ = make_checkpoints(folder)
    config = Qwen3Config(
        vocab_size=320,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,  # wider than hidden / heads, as in the real ones
        intermediate_size=128,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=request.param,
    )
    torch.manual_seed(2)
    Qwen3ForCausalLM(config).save_pretrained(folder / "qwen3")
    make_tokenizer(CORPUS, 300).save_pretrained(folder / "qwen3")
    randomise(folder / "qwen3", 4)
    return encoder, folder / "qwen3"


@matrix.layouts(matrix.SINGLE, matrix.TP2, matrix.TP2_PP2, slow=(matrix.TP4,))
def test_training_equals_transformers(layout, world, workers: Workers, folders: tuple[Path, Path]) -> None:
    wanted = reference_training(*folders, OBJECTIVE)
    results = workers.run(training_jobs.train_steps, layout, world, *folders, shares(layout, world), OBJECTIVE, 2)
    assert all(any("q_norm" in name for name in found["weights"]) for found in results)
    check(results, wanted)


def test_import_and_verify(folders: tuple[Path, Path], tmp_path: Path) -> None:
    import_checkpoint(*folders, tmp_path / "checkpoint", None, 5)
    assert verify_checkpoint(tmp_path / "checkpoint", *folders).passed


@matrix.layouts(matrix.SINGLE, matrix.TP2_PP2)
def test_a_saved_checkpoint_comes_back_from_its_files(
    layout, world, workers: Workers, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    workers.run(checkpoint_jobs.save_checkpoint, layout, world, *folders, tmp_path / "saved")
    export_checkpoint(tmp_path / "saved", "mllm", tmp_path / "llava", "drop", None)
    found = load_file(tmp_path / "llava" / "model.safetensors")
    for name, tensor in load_file(folders[1] / "model.safetensors").items():
        assert torch.equal(found[f"language_model.{name}"], tensor), name
    assert verify_checkpoint(tmp_path / "saved", *folders).passed


@matrix.layouts(matrix.SINGLE, matrix.TP2_PP2)
def test_round_trip_is_bit_exact(layout, world, workers: Workers, folders: tuple[Path, Path]) -> None:
    wanted = load_file(folders[1] / "model.safetensors")
    for found in workers.run(jobs.round_trip, layout, world, *folders):
        assert {n for n in found if n.startswith(("model.", "lm_head."))} == wanted.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_an_assembled_model_and_back(folders: tuple[Path, Path], tmp_path: Path) -> None:
    import_checkpoint(*folders, tmp_path / "checkpoint", None, 5)
    export_checkpoint(tmp_path / "checkpoint", "mllm", tmp_path / "llava", "drop", None)
    import_assembled(tmp_path / "llava", tmp_path / "again", None)
    assert same_parameters(tmp_path / "checkpoint", tmp_path / "again")
    model, told = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava", output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    loaded = model.model.language_model.state_dict()
    for name, tensor in load_file(folders[1] / "model.safetensors").items():
        found = model.lm_head.weight if name == "lm_head.weight" else loaded[name.removeprefix("model.")]
        assert torch.equal(found, tensor), name
