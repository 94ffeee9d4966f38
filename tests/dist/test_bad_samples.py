"""Broken samples in a run: stopped at by name, or left out alike on every rank, counted and named."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pivot_megatron.config.load import load_config
from pivot_megatron.config.schema import Layout
from pivot_megatron.data.shard_writer import ShardWriter
from pivot_megatron.data.shards import open_shards
from pivot_megatron.errors import RuleError, UserError
from pivot_megatron.train.run_folder import read_metrics
from tests import matrix
from tests.dist.runs import config_tree, make_world, train_at, write_config
from tests.harness import Workers

BROKEN = {"001": "bad_image", "007": "bad_image", "011": "missing_field", "019": "identical_answers"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pairs: `broken`, some of them damaged; `sound`, without those; `cut`, the two of them with half an image."""
    folder = make_world(tmp_path_factory.mktemp("world"), pairs=24)
    reader = open_shards(folder / "pairs")
    names = ("broken", "sound", "cut")
    with ExitStack() as stack:
        broken, sound, other = (stack.enter_context(ShardWriter(folder / name, 100)) for name in names)
        for n in range(len(reader)):
            pair, key = reader.read(n), f"{n:03d}"
            row = {"question": pair.question, "chosen": pair.chosen, "rejected": pair.rejected}  # type: ignore[union-attr]
            if key not in BROKEN:
                sound.write(key, pair.image, "jpg", row)
                broken.write(key, pair.image, "jpg", row)
            elif key == "011":
                broken.write(key, pair.image, "jpg", {"question": "q", "chosen": "a"})
            elif key == "019":
                broken.write(key, pair.image, "jpg", row | {"chosen": "a"} | {"rejected": "a"}, rejected_image=pair.image)
            else:
                broken.write(key, cut(pair.image), "jpg", row)
                other.write(key, cut(pair.image), "jpg", row)
    return folder


def cut(image: bytes | None) -> bytes:
    """Its head is whole, so that only who decodes it sees that it is broken."""
    assert image is not None
    return image[: len(image) // 2]


def config(data: Path, folder: Path, shards: str = "broken", size: int = 24, **keys: Any) -> Path:
    tree = config_tree(data, folder / "run")
    tree["data"] |= {"shards": [str(data / shards)], "on_bad_sample": "skip", "max_bad_share": 0.2, **keys}
    tree["batch"] |= {"steps": 2, "global_size": size}
    tree["objective"]["reference"] = "cached"
    folder.mkdir(exist_ok=True)
    return write_config(folder / "run.yaml", tree)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "run")]


@pytest.fixture(scope="module")
def without(data: Path, workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Of a run whose global batch is the sound samples alone."""
    folder = tmp_path_factory.mktemp("sound")
    _, layout, world = matrix.SINGLE
    workers.run(train_at, None, world, config(data, folder, "sound", size=20), layout)
    return losses(folder)


@matrix.layouts(matrix.SINGLE, matrix.TP2, matrix.PP2, matrix.DP2)
def test_they_are_left_out_alike(layout, world, data: Path, without, workers: Workers, tmp_path: Path) -> None:
    for file in (data / "broken").glob("reference-*"):
        file.unlink()
    workers.run(train_at, None, world, config(data, tmp_path / "r"), layout)
    assert losses(tmp_path / "r") == pytest.approx(without, rel=1e-4)
    lines = read_metrics(tmp_path / "r" / "run")
    assert [(line["pairs"], line["bad"], line["dropped"]) for line in lines] == [(20, 4, 4)] * 2
    named = [json.loads(line) for line in (tmp_path / "r" / "run" / "dropped.jsonl").read_text().splitlines()]
    assert len(named) == 8 and {row["key"]: row["reason"] for row in named} == BROKEN and all(row["bad"] for row in named)


@matrix.layouts(matrix.SINGLE, matrix.PP2, matrix.DP2)
def test_past_the_share_the_run_stops(layout, world, data: Path, workers: Workers, tmp_path: Path) -> None:
    said = workers.run(run_error, None, world, config(data, tmp_path / "r", max_bad_share=0.1), layout)
    assert all("4 of 24 samples are broken, more than the share 0.1" in one for one in said)


def test_unless_told_the_run_stops_at_the_first(data: Path, workers: Workers, tmp_path: Path) -> None:
    (said,) = workers.run(run_error, None, 1, config(data, tmp_path / "r", on_bad_sample="stop"), Layout())
    assert "2 of 24 samples are broken, the first: sample 011: missing_field" in said
    (said,) = workers.run(run_error, None, 1, config(data, tmp_path / "r", "cut", on_bad_sample="stop"), Layout())
    assert "sample 00" in said and "bad_image" in said and "set data.on_bad_sample: skip" in said
    # And goes on once it is told otherwise.
    workers.run(train_at, None, 1, config(data, tmp_path / "r"), Layout())
    assert len(losses(tmp_path / "r")) == 2


def run_error(config_file: Path, layout: Layout) -> str:
    """A worker's job: the message that a run ends with."""
    from dataclasses import replace

    from pivot_megatron.train.trainer import train

    try:
        train(replace(load_config(config_file), layout=layout))
    except (RuleError, UserError) as error:
        return str(error)
    raise AssertionError("the run went through")


def test_a_global_batch_of_broken_samples_alone_stops_the_run(data: Path, workers: Workers, tmp_path: Path) -> None:
    with ShardWriter(data / "all-broken", 100) as broken:
        for n in range(4):
            image = cut(open_shards(data / "sound").read(n).image)
            broken.write(f"{n}", image, "jpg", {"question": "q", "chosen": "a", "rejected": "b"})
    (said,) = workers.run(run_error, None, 1, config(data, tmp_path / "r", "all-broken", 4, max_bad_share=1.0), Layout())
    assert "step 1: none of its 4 samples is sound" in said
