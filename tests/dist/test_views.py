"""Whole runs over images of every shape, as tiles and at their own aspect ratio: the same at every layout, and from stage to stage."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from pivot_megatron.checkpoints.folder import resolve_checkpoint
from pivot_megatron.convert.store import describe
from pivot_megatron.data.shard_writer import ShardWriter
from pivot_megatron.data_prep.synthetic import make_question
from pivot_megatron.train.run_folder import read_metrics
from tests import matrix
from tests.dist.runs import config_tree, make_world, train_at, train_error, write_config
from tests.harness import Workers
from tests.parity.encoders import make
from tests.unit.test_views import noise

TILES = {"grids": [[1, 2], [2, 1], [2, 2]], "max_tiles": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_world(tmp_path_factory.mktemp("world"), pairs=1)
    make("siglip2", folder / "native")
    draw = random.Random(7)
    with ShardWriter(folder / "shapes", samples_per_shard=100) as writer:
        for n in range(24):
            asked = make_question(3, n)
            row = {"question": asked.question, "chosen": asked.chosen, "rejected": asked.rejected}
            image = noise(draw.randint(20, 120), draw.randint(20, 120))
            writer.write(f"{n:03d}", None if n % 8 == 7 else image, "png", row)
    return folder


def config(data: Path, folder: Path, kind: str, **model: Any) -> Path:
    tree = config_tree(data, folder / "run")
    tree["data"] |= {"shards": [str(data / "shapes")], "sequence_length": 160}
    tree["batch"] |= {"steps": 3, "micro_tokens": 400}
    if kind == "native":
        tree["model"]["encoder"]["hf"] = str(data / "native")
    else:
        tree["model"]["anyres"] = TILES
    tree["model"] |= model
    folder.mkdir(exist_ok=True)
    return write_config(folder / "run.yaml", tree)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "run")]


@pytest.fixture(scope="module", params=["tiles", "native"])
def single(request: pytest.FixtureRequest, data: Path, workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    _, layout, world = matrix.SINGLE
    assert workers.run(train_at, None, world, config(data, folder, request.param), layout) == [3]
    return request.param, folder


@matrix.layouts(matrix.TP2, matrix.PP2, matrix.DP2)
def test_a_run_is_the_same_at_every_layout(layout, world, single, data: Path, workers: Workers, tmp_path: Path) -> None:
    kind, alone = single
    workers.run(train_at, None, world, config(data, tmp_path / "r", kind), layout)
    assert losses(tmp_path / "r") == pytest.approx(losses(alone), rel=1e-4)
    assert losses(alone)[0] == pytest.approx(0.6931, abs=1e-4) != losses(alone)[2]


def test_the_next_stage_sees_images_alike(single, data: Path, workers: Workers, tmp_path: Path) -> None:
    """All parts from a checkpoint, and not a word about tiles."""
    kind, folder = single
    parts: dict[str, Any] = {name: {"checkpoint": str(folder / "run")} for name in ("encoder", "llm", "projector")}
    tree = config(data, tmp_path / "next", "native", **parts)
    _, layout, world = matrix.SINGLE
    workers.run(train_at, None, world, tree, layout)
    before, after = (describe(resolve_checkpoint(path / "run")) for path in (folder, tmp_path / "next"))
    assert before.anyres == after.anyres and (after.anyres is not None) == (kind == "tiles")
    assert before.image_views() == after.image_views()


def test_a_run_goes_on_as_it_began(single, data: Path, workers: Workers) -> None:
    kind, folder = single
    other = {"anyres": TILES | {"max_tiles": 1}} if kind == "tiles" else {"encoder": {"hf": str(data / "native"), "max_patches": 9}}
    key = "model.anyres" if kind == "tiles" else "model.encoder.max_patches"
    _, layout, world = matrix.SINGLE
    (said,) = workers.run(train_error, None, world, config(data, folder, kind, **other), layout)
    assert key in said
