"""Images as tiles against `LlavaOnevisionForConditionalGeneration`: log-probs, gradients, greedy answers, and the way back."""

from __future__ import annotations

import io
import json
import random
import shutil
import unittest.mock
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel
from transformers.processing_utils import VideosKwargs

from pivot_megatron.config.schema import AnyRes, Component, Encoder, Layout, Model, Projector, Sft
from pivot_megatron.convert.assembled import spellings_in
from pivot_megatron.convert.commands import export_checkpoint, import_assembled, import_checkpoint
from pivot_megatron.convert.plan import COMPONENTS, component_rows
from pivot_megatron.convert.start import describe_start
from pivot_megatron.convert.store import describe
from pivot_megatron.convert.verify import verify_checkpoint
from pivot_megatron.data.build import load_tokenizer
from pivot_megatron.data.chat import qwen_1_5, render
from pivot_megatron.data.images import ImageTransform
from pivot_megatron.data.packing import pack
from pivot_megatron.data.sample import Pair
from pivot_megatron.data.tokens import SampleTokenizer, Tokenized
from pivot_megatron.data.views import Tiled, pixels_of
from pivot_megatron.errors import UserError
from pivot_megatron.model.projector import joined
from tests import matrix
from tests.harness import Workers
from tests.parity import checkpoint_jobs, jobs, training_jobs
from tests.parity.encoders import make
from tests.parity.imported import same_parameters
from tests.parity.reference import make_checkpoints, relative_difference
from tests.unit.test_views import noise, tiled

TILES = AnyRes(grids=tuple((r, c) for r in range(1, 4) for c in range(1, 4)), max_tiles=2)
SIZES = [(64, 40), (30, 100), (90, 90), (20, 20)]


@pytest.fixture(scope="module", params=["siglip", "clip"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("anyres")
    return make(request.param, folder / "encoder"), make_checkpoints(folder / "other")[1]


@pytest.fixture(scope="module")
def checkpoint(folders: tuple[Path, Path], workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("saved") / "checkpoint"
    workers.run(checkpoint_jobs.save_checkpoint, Layout(), 1, *folders, out, TILES)
    return out


@pytest.fixture(scope="module")
def export(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "mllm"
    export_checkpoint(checkpoint, "mllm", out, "drop", None)
    return out


PAIRS = [
    Pair(f"{n}", noise(*size), "what colour is the circle", "the circle is red", "a triangle", {})
    for n, size in enumerate(SIZES)
]


def ours(checkpoint: Path) -> tuple[list[Tokenized], list[Tensor]]:
    description = describe(checkpoint)
    views, tokenizer = description.image_views(), load_tokenizer(description.llm)
    tokenize = SampleTokenizer(tokenizer, qwen_1_5, None, 2048, 2, "drop")
    samples = [tokenize(pair, [views.view(*size)]) for pair, size in zip(PAIRS, SIZES, strict=True)]
    return samples, [pixels_of(views, pair.image or b"", "pil") for pair in PAIRS]


class Theirs:
    def __init__(self, folder: Path) -> None:
        loaded: Any = LlavaOnevisionForConditionalGeneration.from_pretrained(
            folder, attn_implementation="eager", output_loading_info=True
        )
        self.model, told = loaded
        assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        self.processor = onevision_processor(folder)

    def inputs(self, pair: Pair, text: str) -> Any:
        return self.processor(images=Image.open(io.BytesIO(pair.image or b"")), text=text, return_tensors="pt")

    def logprobs(self, pair: Pair, branch: int) -> Tensor:
        """Of the answer's tokens that are predicted in the loss."""
        rendered = render(pair, qwen_1_5)
        answer = "".join(span.text for span in rendered.branches[branch])
        inputs = self.inputs(pair, rendered.prefix + answer)
        ids = inputs["input_ids"][0]
        count = len(self.processor.tokenizer.encode(answer, add_special_tokens=False))
        logps: Tensor = self.model(**inputs).logits[0].log_softmax(-1)[-count - 1 : -1]
        return logps.gather(1, ids[-count:, None])[:, 0]


def onevision_processor(folder: Path) -> Any:
    """Made of the export's files piece by piece: all of it at once would need torchvision, for videos."""
    options, _ = LlavaOnevisionProcessor.get_processor_dict(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    images = LlavaOnevisionImageProcessorPil.from_pretrained(folder)
    with unittest.mock.patch.object(LlavaOnevisionProcessor, "check_argument_for_proper_class"):
        return LlavaOnevisionProcessor(images, tokenizer, SimpleNamespace(valid_kwargs=VideosKwargs), **options)


def test_tiles_are_joined_as_in_transformers() -> None:
    draw = random.Random(1)
    for most in (1, 2, 9):
        views = tiled(most)
        config = LlavaOnevisionConfig(
            vision_config={"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8},
            image_grid_pinpoints=[[r * 32, c * 32] for r, c in views.grids],
        )
        model = LlavaOnevisionModel.__new__(LlavaOnevisionModel)
        torch.nn.Module.__init__(model)
        model.config = config
        for _ in range(40):
            width, height = draw.randint(10, 200), draw.randint(10, 200)
            view = views.view(width, height)
            assert view.tiling is not None
            features = torch.randn(len(view.grids), 16, 8)
            newline = torch.randn(8)
            (wanted,), _ = model.pack_image_features(
                [features], torch.tensor([[height, width]]), newline, f"anyres_max_{most}"
            )
            found = joined(features.flatten(0, 1), (4, 4), view.tiling, newline)
            assert found.shape[0] == view.tokens and torch.equal(found, wanted), (width, height, most)


@matrix.layouts(matrix.SINGLE, matrix.TP2, matrix.PP2, slow=(matrix.TP2_PP2,))
def test_logprobs_are_transformers_own(layout, world, workers: Workers, checkpoint: Path, export: Path) -> None:
    samples, pixels = ours(checkpoint)
    assert len({len(sample.views[0].grids) for sample in samples}) > 1
    batch = pack(samples, pixels, branches_per_sample=2, multiple=4)
    theirs = Theirs(export)
    with torch.no_grad():
        wanted = torch.cat([theirs.logprobs(pair, branch) for pair in PAIRS for branch in range(2)])
    answers = [
        found for found in workers.run(checkpoint_jobs.checkpoint_logprobs, layout, world, checkpoint, [batch]) if found
    ]
    assert answers
    for (found,) in answers:
        assert relative_difference(found, wanted) <= 1e-5


@matrix.layouts(matrix.SINGLE, matrix.TP2_PP2, slow=(matrix.TP2,))
def test_gradients_are_transformers_own(
    layout, world, workers: Workers, folders, checkpoint: Path, export: Path
) -> None:
    samples, pixels = ours(checkpoint)
    firsts = [Tokenized(s.key, s.prefix, s.branches[:1], s.images, s.views) for s in samples]
    theirs = Theirs(export)
    logps = torch.cat([theirs.logprobs(pair, 0) for pair in PAIRS])
    (-logps.mean()).backward()
    wanted = {name: p.grad for name, p in theirs.model.named_parameters() if p.grad is not None}
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    arch = jobs.architecture(*folders, TILES)
    shares: training_jobs.Shares = [[(firsts[:3], pixels[:3]), (firsts[3:], pixels[3:])]]
    train = partial(training_jobs.train_steps, anyres=TILES)
    for found in workers.run(train, layout, world, *folders, shares, Sft(), 1):
        for component in COMPONENTS:
            for part in (part for row in component_rows(arch, component) for part in row.hf):
                expected = next(wanted[name] for name in spellings_in(arch, component, part) if name in wanted)
                difference = float((found["gradients"][part] - expected).abs().max())
                assert difference <= 1e-4 * max(float(expected.abs().max()), 1e-3 * largest), part
        assert float(found["gradients"]["image_newline"].abs().max()) > 0


def test_an_assembled_model_comes_back(checkpoint: Path, export: Path, tmp_path: Path) -> None:
    import_assembled(export, tmp_path / "again", None)
    assert same_parameters(checkpoint, tmp_path / "again")
    assert describe(tmp_path / "again").anyres == TILES
    found = verify_checkpoint(tmp_path / "again", None, None, mllm=export, tolerance=1e-5)
    assert found.passed and "tensor image_newline" in {check.what for check in found.checks}, found.table()
    assert describe(tmp_path / "again").image_views() == describe(checkpoint).image_views()


def test_verify_takes_the_export_of_its_own_features_and_resolution(
    checkpoint: Path, export: Path, folders: tuple[Path, Path], workers: Workers, tmp_path: Path
) -> None:
    """The export of an encoder's layers up to its features; tiles larger than the export's; tiles that are the default, which an
    export writes out."""
    import_assembled(export, tmp_path / "larger", None, image_size=48)
    workers.run(checkpoint_jobs.save_checkpoint, Layout(), 1, *folders, tmp_path / "default", AnyRes())
    export_checkpoint(tmp_path / "default", "mllm", tmp_path / "written-out", "drop", None)
    for ours, theirs in (
        (checkpoint, export),
        (tmp_path / "larger", export),
        (tmp_path / "default", tmp_path / "written-out"),
    ):
        found = verify_checkpoint(ours, None, None, mllm=theirs, tolerance=1e-5)
        assert found.passed and "head log-probs" in {check.what for check in found.checks}, found.table()


@matrix.layouts(matrix.SINGLE, slow=(matrix.TP2,))
def test_greedy_answers_are_transformers_own(layout, world, workers: Workers, checkpoint: Path, export: Path) -> None:
    samples, pixels = ours(checkpoint)
    theirs = Theirs(export)
    for pair, sample, image in zip(PAIRS[:2], samples, pixels, strict=False):
        inputs = theirs.inputs(pair, render(pair, qwen_1_5).prefix)
        length = inputs["input_ids"].shape[1]
        with torch.no_grad():
            wanted = theirs.model.generate(**inputs, do_sample=False, max_new_tokens=10, eos_token_id=None)[0, length:]
        for found in workers.run(checkpoint_jobs.greedy, layout, world, checkpoint, sample, [image], 10):
            assert found == wanted.tolist()


def test_tokens_of_a_true_size_are_as_many_as_the_readme_says() -> None:
    steps = ImageTransform(resample=2, rescale_factor=1 / 255, mean=(0.5,) * 3, std=(0.5,) * 3, image_size=384)
    views = Tiled(steps, 24, AnyRes().every_grid, AnyRes().max_tiles)
    assert [views.view(*size).tokens for size in ((384, 384), (640, 480))] == [1176, 2340]
    sizes = range(50, 2500, 37)
    assert views.view(713, 1928).tokens == 6946
    assert max(views.view(width, height).tokens for width in sizes for height in sizes) < 7000


def test_tiles_may_follow_upon_squares(folders: tuple[Path, Path], tmp_path: Path, workers: Workers) -> None:
    """A projector that was trained on squares has no newline yet; one that has, brings its tiles with it."""
    import_checkpoint(*folders, tmp_path / "squares", None, 5)
    squares = tmp_path / "squares"
    parts: dict[str, Any] = {"llm": Component(checkpoint=squares), "projector": Projector(checkpoint=squares)}
    start = Model(encoder=Encoder(checkpoint=tmp_path / "squares"), **parts, anyres=TILES)
    (weights,) = workers.run(checkpoint_jobs.started, Layout(), 1, start)
    before = workers.run(checkpoint_jobs.loaded_checkpoint, Layout(), 1, tmp_path / "squares")[0]
    assert weights.keys() - before.keys() == {"image_newline"} and weights["image_newline"].std() > 0
    assert all(torch.equal(weights[name], tensor) for name, tensor in before.items())
    workers.run(checkpoint_jobs.save_checkpoint, Layout(), 1, *folders, tmp_path / "tiles", TILES)
    tiles = Model(
        encoder=Encoder(hf=folders[0]), llm=Component(hf=folders[1]), projector=Projector(checkpoint=tmp_path / "tiles")
    )
    assert describe_start(tiles).anyres == TILES


def test_other_ways_of_tiling_are_refused(export: Path, tmp_path: Path) -> None:
    for key, value, said in (
        ("vision_aspect_ratio", "anyres", "expected anyres_max_"),
        ("image_grid_pinpoints", [[32, 50]], "whole tiles of 32 pixels"),
    ):
        folder = copied(export, tmp_path / key, key, value)
        with pytest.raises(UserError, match=said):
            import_assembled(folder, tmp_path / "out", None)
        assert not (tmp_path / "out").exists()


def copied(folder: Path, out: Path, key: str, value: Any) -> Path:
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {key: value}))
    return out
