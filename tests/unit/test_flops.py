"""Operations of a training step by count, against what torch counts in transformers' own model and against pairs one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaForConditionalGeneration

from pivot_megatron.bench.shapes import shape_by_name
from pivot_megatron.bench.world import World, make_world
from pivot_megatron.config.schema import ParameterRule
from pivot_megatron.convert.plan import rows_by_parameter
from pivot_megatron.convert.store import describe
from pivot_megatron.data.packing import pack
from pivot_megatron.data.tokens import Branch, Tokenized
from pivot_megatron.data.views import View
from pivot_megatron.model.composition import Architecture
from pivot_megatron.model.flops import Flops, SampleWork, Trained, TrainingFlops, Work, backward, forward, pack_flops

SHAPE = shape_by_name("tiny")
ROWS, LENGTH = 2, 20


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("flops"), SHAPE, seed=5)


@pytest.fixture(scope="module")
def arch(world: World) -> Architecture:
    return describe(world.checkpoint).architecture()


def counted(world: World, trained: Trained) -> int:
    """Forward and backward over rows of one image each."""
    model = LlavaForConditionalGeneration.from_pretrained(world.llava, attn_implementation="eager").requires_grad_(
        False
    )
    model.model.vision_tower.requires_grad_(trained.encoder)
    model.model.multi_modal_projector.requires_grad_(trained.projector)
    model.model.language_model.requires_grad_(trained.llm)
    ids = torch.full((ROWS, LENGTH), 7)
    ids[:, 3 : 3 + SHAPE.image_tokens] = model.config.image_token_id
    pixels = torch.rand(ROWS, 3, SHAPE.image_size, SHAPE.image_size)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, pixel_values=pixels).logits.square().mean().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "trained",
    [
        Trained(llm=False),
        Trained(encoder=False, projector=False),
        Trained(encoder=False, llm=False),
    ],
    ids=str,
)
def test_frozen_parts_take_what_torch_counts(world: World, arch: Architecture, trained: Trained) -> None:
    tokens = ROWS * LENGTH
    forwards = forward(arch, Work(images=ROWS, tokens=tokens, scores=ROWS * LENGTH**2, scored=tokens, last=tokens))
    found = (forwards + backward(forwards, trained)).total
    if trained.projector and not trained.encoder:  # torch leaves out the gradient of its first linear's input
        found -= 2 * ROWS * SHAPE.image_tokens * arch.encoder.hidden * arch.head.hidden
    assert found == counted(world, trained)


def tokenized(prefix: int, answers: tuple[int, int], views: list[View]) -> Tokenized:
    """All but the first token of each answer has loss."""
    branches = tuple(Branch((5,) * n, (False, *[True] * (n - 1))) for n in answers)
    return Tokenized("k", (1,) * prefix, branches, tuple(2 for _ in views), tuple(views))


def test_a_pack_takes_what_its_samples_take_without_padding(arch: Architecture) -> None:
    wide, small = View.of_patches(2, 3), View.of_patches(1, 2)
    samples = [tokenized(30, (5, 9), [wide]), tokenized(28, (7, 4), [small]), tokenized(6, (2, 3), [])]
    batch = pack(samples, [torch.zeros(1)] * 2, 2, multiple=16)
    assert batch.padding == 2 and batch.length == 94
    scores = 35**2 + 9 * 39 + 35**2 + 4 * 32 + 8**2 + 3 * 9
    found = pack_flops(arch, batch)
    assert replace(found, patches=0.0, encoder=0.0, projector=0.0) == forward(arch, Work(0, 94, scores, 24, 24))
    width, layers = arch.encoder.hidden, arch.encoder_layers
    weights = 4 * width**2 + 2 * width * arch.encoder.ffn
    assert found.patches == 2 * 8 * 3 * arch.encoder.patch_size**2 * width
    assert found.encoder == 2 * layers * (8 * weights + 2 * width * (6**2 + 2**2))
    assert found.projector == pytest.approx(2 * 8 * arch.head.hidden * (width + arch.head.hidden), rel=1e-12)
    once = TrainingFlops(arch, Trained()).of([batch])
    assert once == (found + backward(found)).total
    assert TrainingFlops(arch, Trained()).of([batch, batch]) == 2 * once


@pytest.mark.parametrize("trained", [Trained(), Trained(encoder=False), Trained(encoder=False, llm=False)], ids=str)
def test_samples_weigh_what_a_step_takes_without_what_a_mask_hides(arch: Architecture, trained: Trained) -> None:
    """Encoder layers that are built, and passes of parts that train: an aligned projector's image weighs little."""
    sample, work = tokenized(30, (5, 9), [View.of_patches(2, 3)]), SampleWork(arch, trained)
    step = TrainingFlops(arch, trained).of([pack([sample], [torch.zeros(1)], 2, multiple=1)])
    head = arch.head
    hidden = Flops(attention=4 * (35 * 34 / 2 + 9 * 8 / 2) * head.layers * head.heads * head.head_dim)
    hidden += backward(hidden, trained)
    assert work.images([6]) + work.text(sample.segments, 12) == pytest.approx(step - hidden.total, rel=1e-12)


def test_a_pack_of_padding_takes_nothing(arch: Architecture) -> None:
    assert pack_flops(arch, pack([], [], 2, multiple=16)) == Flops()


def test_rules_say_which_parts_train(arch: Architecture) -> None:
    names = list(rows_by_parameter(arch))

    def by(*rules: tuple[str, float | str]) -> Trained:
        return Trained.by(names, [ParameterRule(match, rate) for match, rate in rules])  # type: ignore[arg-type]

    assert by() == Trained()
    assert by(("llm.*", "frozen")) == Trained(llm=False)
    assert by(("projector.*", 0.5), ("*", "frozen")) == Trained(encoder=False, llm=False)
    assert by(("encoder.decoder.layers.0.*", "frozen")) == Trained()


def test_how_samples_are_packed_changes_nothing(arch: Architecture) -> None:
    sizes = [tokenized(30, (5, 9), [View.of_patches(2, 3)]), tokenized(28, (7, 4), [View.of_patches(3, 3)])]
    flops = TrainingFlops(arch, Trained())
    apart = [pack([one], [torch.zeros(1)], 2, multiple=16) for one in sizes]
    together = pack(sizes, [torch.zeros(1)] * 2, 2, multiple=32)
    assert flops.of(apart) == pytest.approx(flops.of([together]), rel=1e-12)
