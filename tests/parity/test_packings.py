"""Whatever pairs come together and however they are packed: loss and gradients are those of plain torch, pair by pair."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pivot_megatron.config.schema import Dpo, Layout
from pivot_megatron.data.tokens import Branch, Tokenized
from tests import matrix
from tests.harness import Workers
from tests.parity import jobs, training_jobs
from tests.parity.reference import SQUARE, make_checkpoints, make_pixels
from tests.parity.test_training import TOLERANCE, reference_training, worst

# Logits of some 40 tokens over 300 words, a few dozen words at a time.
TILE_BYTES = 4096
OBJECTIVE = Dpo(beta=0.3, losses={"sigmoid": 1.0, "sft": 0.2})


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_checkpoints(tmp_path_factory.mktemp("hf"))


class Drawn:
    """Pairs of random lengths without an image, with one of their own, with one that another pair shows too, or with one for
    each answer; in random micro-batches, one of which may be empty."""

    def __init__(self, seed: int, replicas: int) -> None:
        self._random = random.Random(seed)
        self._pixels = make_pixels(12, seed)
        self._images = 0
        pairs = [self._pair(n) for n in range(self._random.randint(2, 5))]
        self.data = [(pair, [self._pixels[i] for i in shown]) for pair, shown in pairs]
        self._random.shuffle(pairs)
        count = self._random.randint(1, 3)
        bins: list[list[tuple[Tokenized, list[int]]]] = [[] for _ in range(count * replicas)]
        for pair in pairs:
            self._random.choice(bins).append(pair)
        batches = [self._micro_batch(chosen) for chosen in bins]
        self.shares = [batches[r * count : (r + 1) * count] for r in range(replicas)]

    def _ids(self, low: int, high: int) -> tuple[int, ...]:
        return tuple(self._random.randrange(200) for _ in range(self._random.randint(low, high)))

    def _image(self, shared: bool) -> int:
        if shared and self._images:
            return self._random.randrange(self._images)
        self._images += 1
        return self._images - 1

    def _pair(self, n: int) -> tuple[Tokenized, list[int]]:
        kind = self._random.choice(["text", "image", "shared", "images"])
        before, after, placeholder = self._ids(1, 4), self._ids(1, 6), (0,) * SQUARE.tokens
        answers = [self._ids(1, 8), self._ids(1, 8)]
        if kind == "images":
            lead = (*placeholder, *after)
            branches = tuple(Branch((*lead, *a), (False,) * len(lead) + (True,) * len(a)) for a in answers)
            places = (len(before), len(before) + len(branches[0].ids))
            return Tokenized(f"{n}", before, branches, places, (SQUARE, SQUARE)), [
                self._image(False),
                self._image(True),
            ]
        branches = tuple(Branch(a, (True,) * len(a)) for a in answers)
        if kind == "text":
            return Tokenized(f"{n}", (*before, *after), branches, (), ()), []
        prefix = (*before, *placeholder, *after)
        return Tokenized(f"{n}", prefix, branches, (len(before),), (SQUARE,)), [self._image(kind == "shared")]

    def _micro_batch(self, chosen: list[tuple[Tokenized, list[int]]]) -> tuple[list[Tokenized], Tensor, list[int]]:
        shown = [i for _, images in chosen for i in images]
        distinct = sorted(set(shown))
        return [pair for pair, _ in chosen], self._pixels[distinct], [distinct.index(i) for i in shown]


def check(
    seed: int, layout: Layout, world: int, workers: Workers, checkpoints: tuple[Path, Path], cached: bool
) -> None:
    drawn = Drawn(seed, world // layout.model_parallel_size)
    wanted = reference_training(*checkpoints, OBJECTIVE, steps=1, data=drawn.data)
    arguments = (*checkpoints, drawn.shares, OBJECTIVE, 1, (), jobs.NOTHING_AGAIN, TILE_BYTES, cached)
    for found in workers.run(training_jobs.train_steps, layout, world, *arguments):
        assert found["results"][0].loss == pytest.approx(wanted["losses"][0], rel=TOLERANCE)
        assert found["results"][0].grad_norm == pytest.approx(wanted["norms"][0], rel=TOLERANCE)
        gradients = {n: t for n, t in wanted["gradients"].items() if n in found["gradients"]}
        assert len(gradients) > 20 and worst(found["gradients"], gradients) <= (TOLERANCE, "~")


# What was drawn is not made smaller on failure: each try takes a second, and a seed is small enough.
RANDOMLY = {"deadline": None, "phases": [Phase.explicit, Phase.generate], "suppress_health_check": list(HealthCheck)}


@settings(max_examples=6, **RANDOMLY)
@given(seed=st.integers(0, 10_000), cached=st.booleans())
def test_any_packing(seed: int, cached: bool, workers: Workers, checkpoints: tuple[Path, Path]) -> None:
    check(seed, Layout(), 1, workers, checkpoints, cached)


@pytest.mark.slow
@matrix.layouts(*matrix.TRAINING)
@settings(max_examples=4, **RANDOMLY)
@given(seed=st.integers(0, 10_000), cached=st.booleans())
def test_any_packing_at_every_layout(seed, cached, layout, world, workers: Workers, checkpoints) -> None:
    check(seed, layout, world, workers, checkpoints, cached)


def test_all_kinds_are_drawn() -> None:
    """The seeds do cover what the docstring promises."""
    drawn = [Drawn(seed, 1) for seed in range(60)]
    batches = [batch for d in drawn for share in d.shares for batch in share]
    assert any(not pairs for pairs, _, _ in batches) and any(len(pairs) > 1 for pairs, _, _ in batches)
    assert any(len(index) > len(pixels) for _, pixels, index in batches)
    assert {len(pair.images) for d in drawn for pair, _ in d.data} == {0, 1, 2}
    assert all(isinstance(image, torch.Tensor) for d in drawn for _, images in d.data for image in images)
