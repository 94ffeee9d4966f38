"""Loaders and runs over DALI: the same samples in the same order, and the same losses; needs the `dali` extra."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pivot_megatron.config.load import load_config
from pivot_megatron.config.schema import Layout
from pivot_megatron.convert.start import describe_start
from pivot_megatron.data.build import build_loader
from pivot_megatron.data.loader import Loader
from pivot_megatron.data.shard_writer import ShardWriter
from pivot_megatron.model.flops import SampleWork
from pivot_megatron.runtime.device import current_platform
from pivot_megatron.train.run_folder import read_metrics
from tests.dist.runs import config_tree, make_world, train_at, train_error, write_config
from tests.harness import Workers
from tests.jpegs import broken, jpeg, photo, unusual
from tests.parity.encoders import make
from tests.unit.test_dali import assert_close, needs_dali

pytestmark = needs_dali


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs over JPEGs of every shape, some of another kind, some broken, some without an image."""
    folder = make_world(tmp_path_factory.mktemp("world"), pairs=24)
    make("siglip2", folder / "native")
    damaged = [file for file in broken(1, seed=9) if file][::7]
    files = [jpeg(photo(20 + 9 * n, 150 - 6 * n)) for n in range(20)] + list(unusual().values()) + damaged
    with ShardWriter(folder / "shapes", samples_per_shard=20) as writer:
        for n, file in enumerate([*files, None, *files[:3]]):
            row = {"question": f"what is it {n % 3}", "chosen": "red", "rejected": "blue"}
            writer.write(f"{n:03d}", file, "jpg", row)
    return folder


def tree_of(data: Path, out: Path, kind: str, backend: str, **batch: int) -> dict[str, object]:
    tree = config_tree(data, out)
    tree["data"] |= {"shards": [str(data / "shapes")], "sequence_length": 160, "image_backend": backend}
    tree["data"] |= {"on_bad_sample": "skip", "max_bad_share": 0.9}
    tree["batch"] |= {"micro_tokens": 400} | batch
    if kind == "patches":
        tree["model"]["encoder"]["hf"] = str(data / "native")
    elif kind == "tiles":
        tree["model"]["anyres"] = {"grids": [[1, 2], [2, 1], [2, 2]], "max_tiles": 2}
    return tree


def loader(data: Path, kind: str, backend: str, **keys: int) -> Loader:
    config = load_config(write_config(data / "run.yaml", tree_of(data, data / "unused", kind, backend)))
    start = describe_start(config.model)
    arch = start.architecture()
    made = build_loader(config, data / "llm", start.image_views(), SampleWork(arch), 2, 0, 1, with_images=True)
    return replace(made, **keys)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["square", "tiles", "patches"])
def test_a_loader_gives_the_same_steps_from_any_of_them(data: Path, kind: str) -> None:
    expected = list(loader(data, kind, "torch").steps(0, 6))
    assert sum(len(step.bad) for step in expected) > 2
    for workers, first in ((0, 0), (4, 0), (4, 3)):
        made = loader(data, kind, "dali", workers=workers)
        for ours, theirs in zip(made.steps(first, 6), expected[first:], strict=True):
            assert (ours.step, ours.keys_digest, ours.dropped) == (theirs.step, theirs.keys_digest, theirs.dropped)
            assert (ours.bad, ours.chosen, ours.fitting) == (theirs.bad, theirs.chosen, theirs.fitting)
            for a, b in zip(ours.micro_batches, theirs.micro_batches, strict=True):
                assert (a.keys, a.digests, a.views, a.segments) == (b.keys, b.digests, b.views, b.segments)
                assert all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("tokens", "image_rows", "targets"))
                assert_close((a.pixels + 1) / 2, (b.pixels + 1) / 2, a.keys)


def test_a_run_learns_the_same(data: Path, workers: Workers, tmp_path: Path) -> None:
    losses = {}
    for backend in ("torch", "dali"):
        config = write_config(
            tmp_path / f"{backend}.yaml", tree_of(data, tmp_path / backend, "square", backend, steps=3)
        )
        assert workers.run(train_at, None, 1, config, Layout()) == [3]
        losses[backend] = [(line["loss"], line["bad"], line["keys"]) for line in read_metrics(tmp_path / backend)]
    assert len(list((data / "shapes").glob("reference-*.parquet"))) == 2  # made of pixels that may be others
    if not current_platform().is_cuda:
        assert losses["torch"] == losses["dali"]
