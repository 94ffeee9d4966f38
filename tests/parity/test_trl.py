"""The first optimizer steps against TRL's DPOTrainer: the same weights, the same pairs in the same order, fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from pivot_megatron.bench.agreement import EXACT, REWARDS, largest_differences
from pivot_megatron.bench.peer_environment import default_cache, peer_python
from pivot_megatron.bench.peer_job import Setting, pivot_config
from pivot_megatron.bench.peer_runs import PeerRun, run_pivot, run_trl
from pivot_megatron.bench.shapes import shape_by_name
from pivot_megatron.bench.world import World, make_world
from pivot_megatron.config.load import load_config
from pivot_megatron.convert.hf import read_json
from pivot_megatron.convert.store import describe
from pivot_megatron.data.batch import PackedBatch
from pivot_megatron.data.build import build_loader
from pivot_megatron.data.loader import Loader

pytestmark = pytest.mark.slow

STEPS = 5
# Measured: 2e-6. Past the first step every value depends on Adam's division by gradients as small as rounding.
TOLERANCE = 1e-4
SHAPE = shape_by_name("tiny")

OBJECTIVES = {
    "sigmoid": Setting(STEPS, SHAPE.pairs_a_step, learning_rate=1e-3),
    "sigmoid-strong-beta": Setting(STEPS, SHAPE.pairs_a_step, learning_rate=1e-3, beta=1.0),
    # TRL 1.16.0 reads label_smoothing in other losses alone, so it has no twin of our smoothed sigmoid.
}


@pytest.fixture(scope="module")
def python() -> Path:
    return peer_python(default_cache())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("peers") / "world", SHAPE, seed=5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_first_steps_equal_trl(name: str, python: Path, world: World, tmp_path: Path) -> None:
    setting = OBJECTIVES[name]
    ours = run_pivot(world, setting, tmp_path / "pivot")
    theirs = run_trl(python, world, setting, tmp_path / "trl")
    assert len(ours.steps) == len(theirs.steps) == STEPS
    assert moved(theirs)
    worst = largest_differences(ours.steps, theirs.steps, setting.beta)
    assert set(worst) == {*EXACT, *REWARDS}
    assert max(worst.values()) < TOLERANCE, worst


def moved(run: PeerRun) -> bool:
    """The steps change the model by enough that a wrong update would show."""
    return abs(run.steps[-1]["reward_margin"]) > 1e-2


def test_trl_sees_our_tokens_and_pixels(python: Path, world: World, tmp_path: Path) -> None:
    setting = OBJECTIVES["sigmoid"]
    run_trl(python, world, setting, tmp_path / "trl", keep_batches=True)
    batches = sorted((tmp_path / "trl" / "batches").iterdir())
    loader = our_loader(world, setting, tmp_path)
    image_token = read_json(world.llava / "config.json")["image_token_index"]
    # TRL reads a batch ahead of the last step too, and stops before using it.
    for step, path in enumerate(batches[:STEPS]):
        theirs = torch.load(path)
        (ours,) = loader.load(step).micro_batches
        sequences, scored = separate_sequences(ours, image_token)
        for row, (ids, places) in enumerate(zip(sequences, scored, strict=True)):
            attended = theirs["attention_mask"][row].nonzero().flatten()
            assert attended.tolist() == list(range(len(ids)))
            assert theirs["input_ids"][row, : len(ids)].tolist() == ids.tolist()
            assert theirs["completion_mask"][row].nonzero().flatten().tolist() == places
        assert torch.equal(theirs["pixel_values"], ours.pixels.repeat(2, 1, 1, 1))


def our_loader(world: World, setting: Setting, folder: Path) -> Loader:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(pivot_config(world, setting, folder / "run")))
    encoder = describe(world.checkpoint).architecture().encoder
    sizes = (encoder.image_size, encoder.tokens)
    return build_loader(
        load_config(path), world.encoder, world.llm, *sizes, branches=2, rank=0, size=1, with_images=True
    )


def separate_sequences(batch: PackedBatch, image_token: int) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Our pack as TRL lays pairs out: all chosen, then all rejected, each behind its prefix; and where in each the scored
    tokens are."""
    tokens = batch.tokens.clone()
    tokens[batch.image_positions] = image_token
    sequences: tuple[list[torch.Tensor], ...] = ([], [])
    scored: tuple[list[list[int]], ...] = ([], [])
    for sample in range(batch.samples):
        first = batch.rows[sample, 0]
        prefix = tokens[first : batch.predictors[batch.branch == 2 * sample][0] + 1]
        for side in (0, 1):
            answer = batch.targets[batch.branch == 2 * sample + side]
            sequences[side].append(torch.cat([prefix, answer]))
            scored[side].append(list(range(len(prefix), len(prefix) + len(answer))))
    return sequences[0] + sequences[1], scored[0] + scored[1]
