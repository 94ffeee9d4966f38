"""An encoder and a head of the paper's own sizes, random weights: the round trip, each layer, gradients, a DPO step.

SigLIP2-So400m/16 at 384 pixels and Qwen2.5-0.5B, each beside a small other half: together, in fp32 with Adam's state, they would
take more memory than a laptop has.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pivot_megatron.config.schema import Dpo
from pivot_megatron.convert.commands import export_checkpoint, import_checkpoint
from pivot_megatron.convert.export import Trained
from pivot_megatron.convert.load import hf_source
from pivot_megatron.convert.plan import Slice, component_rows
from pivot_megatron.convert.store import describe
from pivot_megatron.convert.stream import CheckpointParameters
from pivot_megatron.convert.tiny_checkpoints import make_encoder, make_head, make_tokenizer
from pivot_megatron.convert.verify import verify_checkpoint
from pivot_megatron.data.views import View
from tests import matrix
from tests.harness import Workers
from tests.parity import checkpoint_jobs, jobs, training_jobs
from tests.parity.encoders import Library
from tests.parity.images import make_images
from tests.parity.reference import CORPUS, ENCODER, HEAD, make_pairs, randomise

pytestmark = pytest.mark.slow

SO400M = {"image_size": 384, "patch_size": 16, "hidden_size": 1152, "layers": 27, "heads": 16, "ffn": 4304}
QWEN_05B = {"hidden_size": 896, "layers": 24, "heads": 14, "kv_heads": 2, "ffn": 4864, "vocabulary": 151936}
WAIT = 1200.0


@pytest.fixture(scope="module")
def so400m(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("so400m")
    make_encoder(folder / "encoder", **SO400M, seed=1)
    make_head(folder / "head", make_tokenizer(CORPUS, 300), **HEAD, tied=True, seed=2)
    randomise(folder / "encoder", 3)
    return folder / "encoder", folder / "head"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("qwen")
    make_encoder(folder / "encoder", **ENCODER, seed=1)
    make_head(folder / "head", make_tokenizer(CORPUS, 300), **QWEN_05B, tied=True, seed=2)
    randomise(folder / "head", 3)
    return folder / "encoder", folder / "head"


@matrix.layouts(matrix.SINGLE, matrix.TP2, matrix.PP2, matrix.TP2_PP2, matrix.TP4, matrix.TP4_PP2)
def test_round_trip_of_so400m(layout, world, workers: Workers, so400m: tuple[Path, Path], tmp_path: Path) -> None:
    workers.run(checkpoint_jobs.save_checkpoint, layout, world, *so400m, tmp_path / "saved", timeout=WAIT)
    came_back(tmp_path / "saved", "encoder", so400m[0])


@matrix.layouts(matrix.SINGLE, matrix.TP2, matrix.PP2, matrix.TP2_PP2)
def test_round_trip_of_qwen(layout, world, workers: Workers, qwen: tuple[Path, Path], tmp_path: Path) -> None:
    workers.run(checkpoint_jobs.save_checkpoint, layout, world, *qwen, tmp_path / "saved", timeout=WAIT)
    came_back(tmp_path / "saved", "llm", qwen[1])


def came_back(checkpoint: Path, component: str, folder: Path) -> None:
    """Each tensor as it would be exported, one at a time."""
    arch = describe(checkpoint).architecture()
    source, trained = hf_source(arch, component, folder), Trained(arch, CheckpointParameters(checkpoint / "tensors"))
    count = 0
    for count, (name, tensor) in enumerate(trained.parts(component), 1):  # noqa: B007
        assert torch.equal(tensor, source.read(name, Slice())), name
    assert count > 200
    shutil.rmtree(checkpoint)


def test_files_and_activations_of_so400m(so400m: tuple[Path, Path], tmp_path: Path) -> None:
    import_checkpoint(*so400m, tmp_path / "checkpoint", None, 5)
    found = verify_checkpoint(tmp_path / "checkpoint", so400m[0], None, tolerance=1e-5)
    assert found.passed, found.table()
    export_checkpoint(tmp_path / "checkpoint", "encoder", tmp_path / "export", "original", so400m[0])
    stored, exported = load_file(so400m[0] / "model.safetensors"), {}
    for file in (tmp_path / "export").glob("*.safetensors"):
        exported |= load_file(file)
    assert exported.keys() == stored.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in stored.items())


def test_files_and_activations_of_qwen(qwen: tuple[Path, Path], tmp_path: Path) -> None:
    import_checkpoint(*qwen, tmp_path / "checkpoint", None, 5)
    found = verify_checkpoint(tmp_path / "checkpoint", None, qwen[1], tolerance=1e-5)
    assert found.passed, found.table()


def test_gradients_of_so400m(workers: Workers, so400m: tuple[Path, Path]) -> None:
    arch = jobs.architecture(*so400m)
    images = make_images(arch.encoder, 1, seed=8)
    towards = torch.randn(576, 1152, generator=torch.Generator().manual_seed(9))
    library = Library(arch, so400m[0])
    (library.features(images) * towards).sum().backward()
    wanted = {n: p.grad for n, p in library.model.named_parameters() if p.grad is not None}
    largest = max(float(g.abs().max()) for g in wanted.values())
    _, layout, world = matrix.SINGLE
    (found,) = workers.run(jobs.encoder_pass, layout, world, *so400m, images, towards, timeout=WAIT)
    for part in (part for row in component_rows(arch, "encoder") for part in row.hf):
        expected = library.named(wanted, part)
        difference = float((found["gradients"][part] - expected).abs().max())
        assert difference <= 1e-4 * max(float(expected.abs().max()), 1e-3 * largest), part


def test_gradients_of_qwen(workers: Workers, qwen: tuple[Path, Path]) -> None:
    """Of answers' log-probs after a prompt, in a text-only pack."""
    (pair,) = make_pairs(1, seed=4, vocabulary=151_000, text_only=(0,))
    theirs = AutoModelForCausalLM.from_pretrained(qwen[1], attn_implementation="eager").float()
    total = torch.zeros(())
    for branch in pair.branches:
        logps = theirs(torch.tensor([pair.prefix + branch.ids])).logits[0].log_softmax(-1)[len(pair.prefix) - 1 : -1]
        total = total + logps.gather(1, torch.tensor(branch.ids)[:, None]).sum()
    total.backward()
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    _, layout, world = matrix.SINGLE
    (found,) = workers.run(jobs.logprob_gradients, layout, world, *qwen, [pair], timeout=WAIT)
    largest = max(float(g.abs().max()) for g in wanted.values())
    for name, expected in wanted.items():
        difference = float((found[name] - expected).abs().max())
        assert difference <= 1e-4 * max(float(expected.abs().max()), 1e-3 * largest), name


@pytest.mark.skipif(
    psutil.virtual_memory().available < 18 << 30, reason="weights, gradients and Adam's state take 17 GiB"
)
@pytest.mark.parametrize("which", ["so400m", "qwen"])
def test_a_dpo_step(which: str, workers: Workers, request: pytest.FixtureRequest) -> None:
    folders: tuple[Path, Path] = request.getfixturevalue(which)
    arch = jobs.architecture(*folders)
    images = make_images(arch.encoder, 1, seed=4)
    pairs = make_pairs(1, seed=3, vocabulary=200, views=[View.of_patches(arch.encoder.grid, arch.encoder.grid)])
    shares: training_jobs.Shares = [[(pairs, images.pixels)]]
    _, layout, world = matrix.SINGLE
    arguments = (*folders, shares, Dpo(beta=0.3))
    (found,) = workers.run(training_jobs.one_step, layout, world, *arguments, timeout=WAIT)
    assert found["loss"] == pytest.approx(0.6931, abs=1e-4) and found["grad_norm"] > 0
    assert found["unmoved"] == []
