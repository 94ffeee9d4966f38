"""What an answer's log-probs may depend on: its own tokens and its prefix, to the last bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pivot_megatron.data.packing import pack
from pivot_megatron.data.tokens import Branch, Tokenized
from pivot_megatron.data.views import View
from tests import matrix
from tests.harness import Workers
from tests.parity import jobs
from tests.parity.reference import make_checkpoints, make_pairs, make_pixels


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_checkpoints(tmp_path_factory.mktemp("hf"))


def other_tokens(branch: Branch) -> Branch:
    return replace(branch, ids=tuple((i + 57) % 200 for i in branch.ids))


def by_branch(samples: list[Tokenized], logprobs: Tensor) -> list[list[Tensor]]:
    lengths = [len(b.ids) for s in samples for b in s.branches]
    parts = iter(logprobs.split(lengths))
    return [[next(parts) for _ in s.branches] for s in samples]


@pytest.mark.parametrize("changed", [0, 1], ids=["chosen", "rejected"])
@matrix.layouts(matrix.SINGLE, matrix.TP2)
def test_one_answer_does_not_see_the_other(changed, layout, world, workers: Workers, checkpoints) -> None:
    samples, pixels = make_pairs(3, seed=21, vocabulary=200), make_pixels(3, seed=22)
    pair = samples[1]
    branches = tuple(other_tokens(b) if i == changed else b for i, b in enumerate(pair.branches))
    altered = [samples[0], replace(pair, branches=branches), samples[2]]

    def logprobs(batch: list[Tokenized]) -> list[list[Tensor]]:
        return by_branch(batch, workers.run(jobs.forward, layout, world, *checkpoints, batch, pixels)[-1]["logprobs"])

    before, after = logprobs(samples), logprobs(altered)
    assert not torch.equal(before[1][changed], after[1][changed])
    assert torch.equal(before[1][1 - changed], after[1][1 - changed])
    for n in (0, 2):
        for b in (0, 1):
            assert torch.equal(before[n][b], after[n][b])


@matrix.layouts(matrix.SINGLE)
def test_one_image_does_not_see_another(layout, world, workers: Workers, checkpoints) -> None:
    samples, pixels = make_pairs(2, seed=23, vocabulary=200), make_pixels(2, seed=24)
    changed = pixels.clone()
    changed[1] = pixels[1].flip(-1)
    before = by_branch(samples, workers.run(jobs.forward, layout, world, *checkpoints, samples, pixels)[0]["logprobs"])
    after = by_branch(samples, workers.run(jobs.forward, layout, world, *checkpoints, samples, changed)[0]["logprobs"])
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0]))
    assert not any(torch.equal(a, b) for a, b in zip(before[1], after[1]))


def test_pack_layout() -> None:
    """Positions of both branches go on from the prefix, and a branch's first token is predicted from the prefix's last."""
    pair = Tokenized(
        "a",
        (5, 0, 0, 6),
        (Branch((7, 8), (True, True)), Branch((9,), (True,))),
        images=(1,),
        views=(View.of_patches(1, 2),),
    )
    text = Tokenized("b", (1,), (Branch((2, 3), (False, True)), Branch((4,), (True,))), images=(), views=())
    batch = pack([pair, text], [torch.ones(1, 3, 4, 4)], branches_per_sample=2, multiple=8)
    assert batch.tokens.tolist() == [5, 0, 0, 6, 7, 8, 9, 1, 2, 3, 4, 0, 0, 0, 0, 0]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 4, 0, 1, 2, 1, 0, 0, 0, 0, 0]
    assert batch.image_positions.tolist() == [1, 2]
    assert batch.predictors.tolist() == [3, 4, 3, 8, 7]
    assert batch.targets.tolist() == [7, 8, 9, 3, 4]
    assert batch.branch.tolist() == [0, 0, 1, 2, 3]
    # Prefix and chosen see themselves; rejected sees the prefix and itself; padding sees itself.
    assert batch.segments == ((6, 6), (1, 5), (3, 3), (1, 2), (5, 5))
    assert batch.key_index.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 6, 7, 8, 9, 7, 10, 11, 12, 13, 14, 15]
    assert batch.query_ends.tolist() == [0, 6, 7, 10, 11, 16] and batch.key_ends.tolist() == [0, 6, 11, 14, 16, 21]
    assert (batch.samples, batch.branches, batch.length, batch.padding) == (2, 4, 11, 5)


def test_empty_pack_is_padding() -> None:
    batch = pack([], [], branches_per_sample=2, multiple=8)
    assert (
        batch.tokens.shape == (8,) and batch.targets.numel() == 0 and batch.samples == 0 and batch.pixels.shape[0] == 0
    )
