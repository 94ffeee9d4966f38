"""Cut at any step and gone on with other ranks and workers, a run sees the batches that it would have seen."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.dist.runs import loader, make_world

STEPS = 20
STAGES = ((1, 0), (2, 1), (4, 2), (1, 1))
"""Data-parallel ranks and workers."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"), pairs=30)


def seen(data: Path, ranks: int, workers: int, first: int, last: int) -> list[tuple[str, list[str]]]:
    """Of each step the digest that metrics carry, and the keys of all ranks' packs."""
    found: list[tuple[str, list[str]]] = []
    for rank in range(ranks):
        made = loader(data, rank, ranks, workers=workers, micro_tokens=256)
        for at, step in enumerate(made.steps(first, last)):
            if not rank:
                found.append((step.keys_digest, []))
            assert step.keys_digest == found[at][0] and step.step == first + at
            found[at][1].extend(key for batch in step.micro_batches for key in batch.keys)
    return [(digest, sorted(keys)) for digest, keys in found]


@pytest.mark.parametrize("seed", range(3))
def test_no_cut_is_seen(data: Path, seed: int) -> None:
    whole = seen(data, 1, 0, 0, STEPS)
    assert len({digest for digest, _ in whole}) == STEPS and all(len(keys) == 12 for _, keys in whole)
    cuts = sorted(random.Random(seed).sample(range(1, STEPS), len(STAGES) - 1))
    parts = zip(STAGES, [0, *cuts], [*cuts, STEPS], strict=True)
    assert [
        step for (ranks, workers), first, last in parts for step in seen(data, ranks, workers, first, last)
    ] == whole
