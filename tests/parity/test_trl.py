"""The first optimizer steps against TRL's DPOTrainer: the same weights, the same pairs in the same order, fp32."""

from __future__ import annotations

import json
from dataclasses import replace
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
from pivot_megatron.cli import main
from pivot_megatron.config.load import load_config
from pivot_megatron.convert.hf import read_json
from pivot_megatron.convert.store import describe
from pivot_megatron.data.batch import PackedBatch
from pivot_megatron.data.build import build_loader
from pivot_megatron.data.loader import Loader
from pivot_megatron.errors import UserError
from pivot_megatron.model.flops import SampleWork

pytestmark = pytest.mark.slow

STEPS = 5
# Measured: 3e-6 for loss and gradient norm, 2e-7 for log-probs, and no reward further off than rounding alone allows.
TOLERANCE = 1e-4
SHAPE = shape_by_name("tiny")


def setting(beta: float = 0.1, label_smoothing: float = 0.0, **losses: float) -> Setting:
    pairs = SHAPE.pairs_a_step
    return Setting(STEPS, pairs, pairs, 1e-3, beta, losses, label_smoothing)


# Where the two mean the same by a name: TRL's `sigmoid` has no label smoothing, and its `bco_pair` no reward baseline.
OBJECTIVES = {
    "sigmoid": setting(sigmoid=1.0),
    "sigmoid-one-pair-a-pass": replace(setting(sigmoid=1.0), micro_batch=1),
    "sigmoid-strong-beta": setting(beta=1.0, sigmoid=1.0),
    "hinge": setting(hinge=1.0),
    "ipo": setting(ipo=1.0),
    "robust": setting(robust=1.0, label_smoothing=0.2),
    "sigmoid-and-hinge": setting(sigmoid=0.8, hinge=0.3),
}


@pytest.fixture(scope="module")
def python() -> Path:
    try:
        return peer_python(default_cache())
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("peers"), SHAPE, seed=5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_first_steps_equal_trl(name: str, python: Path, world: World, tmp_path: Path) -> None:
    objective = OBJECTIVES[name]
    ours = run_pivot(world, objective, tmp_path / "pivot")
    theirs = run_trl(python, world, objective, tmp_path / "trl")
    assert len(ours.steps) == len(theirs.steps) == STEPS
    assert moved(theirs)
    worst = largest_differences(ours.steps, theirs.steps, objective.beta)
    assert set(worst) == {*EXACT, *REWARDS}
    assert max(worst.values()) < TOLERANCE, worst


def moved(run: PeerRun) -> bool:
    """The steps change the model by enough that a wrong update would show."""
    return abs(run.steps[-1]["reward_margin"]) > 1e-2


def test_trl_sees_our_tokens_and_pixels(python: Path, world: World, tmp_path: Path) -> None:
    objective = OBJECTIVES["sigmoid"]
    run_trl(python, world, objective, tmp_path / "trl", keep_batches=True)
    batches = sorted((tmp_path / "trl" / "batches").iterdir())
    loader = our_loader(world, objective, tmp_path)
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


def our_loader(world: World, objective: Setting, folder: Path) -> Loader:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(pivot_config(world, objective, folder / "run")))
    description = describe(world.checkpoint)
    arch, images = description.architecture(), description.image_views()
    options = {"branches": 2, "rank": 0, "size": 1, "with_images": True}
    return build_loader(load_config(path), world.llm, images, SampleWork(arch), **options)


def separate_sequences(batch: PackedBatch, image_token: int) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Our pack as TRL lays pairs out: all chosen, then all rejected, each behind its prefix; and where in each the scored
    tokens are."""
    tokens = batch.tokens.clone()
    tokens[batch.image_positions] = image_token
    sequences: tuple[list[torch.Tensor], ...] = ([], [])
    scored: tuple[list[list[int]], ...] = ([], [])
    # A pair's first branch has its prefix among its queries, its second none.
    starts = batch.query_ends[: 2 * batch.samples : 2].tolist()
    for sample, start in enumerate(starts):
        prefix = tokens[start : batch.predictors[batch.branch == 2 * sample][0] + 1]
        for side in (0, 1):
            answer = batch.targets[batch.branch == 2 * sample + side]
            sequences[side].append(torch.cat([prefix, answer]))
            scored[side].append(list(range(len(prefix), len(prefix) + len(answer))))
    return sequences[0] + sequences[1], scored[0] + scored[1]


def test_the_page_of_a_comparison(
    python: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # which TRL alone would obey
    out = tmp_path / "bench"
    arguments = ["--shape", "tiny", "--rounds", "1", "--steps", "2", "--trl-environment", "MALLOC_ARENA_MAX=1"]
    assert main(["bench", "peers", *arguments, "--out", str(out)]) == 0
    page = (out / "peers.md").read_text()
    assert page == capsys.readouterr().out
    assert "MALLOC_ARENA_MAX=1" in page and (out / "peers.png").exists()
    tree = json.loads((out / "peers.json").read_text())
    assert list(tree["results"]) == ["pivot:1", "trl:1", "pivot:2", "trl:2"]
    assert max(tree["differences"].values()) < TOLERANCE
    cores = tree["machine"]["cores"]
    assert tree["sides"]["pivot"]["threads"] == tree["sides"]["trl"]["threads"] == [cores]
    assert tree["sides"]["trl"]["attention"] == ["sdpa"]
