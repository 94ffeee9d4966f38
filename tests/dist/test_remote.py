"""A run over shards in an object store is the run over the same shards on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("s3fs")
pytest.importorskip("moto")

from pivot_megatron.config.schema import Layout
from pivot_megatron.train.run_folder import read_metrics
from tests.dist.runs import config_tree, make_world, train_at, write_config
from tests.harness import Workers
from tests.object_store import ObjectStore, object_store


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"), pairs=40)


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as running:
        yield running


def train_there(environment: dict[str, str], config_file: Path, layout: Layout) -> int:
    """A worker's job: a run with these variables in its environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        return train_at(config_file, layout)


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run)]


@pytest.mark.slow
def test_two_ranks_over_s3_with_a_cached_reference(
    data: Path, store: ObjectStore, tmp_path: Path, workers: Workers
) -> None:
    tree = config_tree(data, tmp_path / "local")
    tree["batch"]["steps"] = 5  # one and a half epochs
    workers.run(train_at, None, 2, write_config(tmp_path / "local.yaml", tree), Layout())
    url = store.upload(data / "pairs", "pairs")
    tree["out"] = str(tmp_path / "remote")
    tree["data"] |= {"shards": [url], "cache": {"folder": str(tmp_path / "cache"), "gib": 1}}
    remote = write_config(tmp_path / "remote.yaml", tree)
    workers.run(train_there, None, 2, store.environment, remote, Layout())
    assert losses(tmp_path / "remote") == losses(tmp_path / "local")
    samples = [one for one in store.gets() if one.path.endswith(".tar")]
    assert len({(one.path, one.range) for one in samples}) == len(samples) == 40  # both ranks together, each once
    (reference,) = (tmp_path / "cache" / "beside").glob("bucket-pairs-*/reference-*.parquet")
    # Another run finds both the samples and the reference.
    before = reference.stat().st_mtime_ns
    tree["out"] = str(tmp_path / "again")
    workers.run(train_there, None, 1, store.environment, write_config(tmp_path / "again.yaml", tree), Layout())
    assert reference.stat().st_mtime_ns == before
    assert not [one for one in store.gets() if one.path.endswith(".tar")]
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "local"), rel=1e-5)
    assert json.loads((tmp_path / "again" / "metrics.jsonl").read_text().splitlines()[0])
