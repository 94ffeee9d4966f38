"""`pivot reference` and runs that use what it made."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pivot_megatron.cli import main
from pivot_megatron.config.load import load_config
from pivot_megatron.config.schema import Layout
from pivot_megatron.convert.fingerprint import start_fingerprint
from pivot_megatron.data.reference import Facts
from pivot_megatron.train.run_folder import read_metrics
from tests import matrix
from tests.dist.runs import config_tree, make_world, train_at, train_error, write_config
from tests.harness import Workers


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"), pairs=40)


def config(data: Path, folder: Path, steps: int = 3, reference: str = "cached", **data_keys: object) -> Path:
    tree = config_tree(data, folder / "run")
    tree["objective"] |= {"reference": reference}
    tree["data"] |= data_keys
    tree["batch"]["steps"] = steps
    tree["checkpoints"]["every"] = 100
    folder.mkdir(exist_ok=True)
    return write_config(folder / "run.yaml", tree)


def made(data: Path) -> list[Path]:
    return sorted((data / "pairs").glob("reference-*"))


def facts_of(file: Path) -> Facts:
    told = json.loads(pq.read_schema(file).metadata[b"pivot"])
    return Facts(*(told[name] for name in ("model", "data", "shards", "sequence_length")))


def forget(data: Path) -> None:
    for path in made(data):
        path.unlink()


def losses(folder: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["reward_margin"]) for line in read_metrics(folder / "run")]


def make_at(config_file: Path, layout: Layout) -> None:
    """A worker's job: the reference pass at `layout`."""
    from pivot_megatron.train.trainer import make_reference

    make_reference(replace(load_config(config_file), layout=layout))


def make_beside_another(config_file: Path, batch: int) -> None:
    """A worker's job: a reference pass during which another run makes the same file, from before batch number `batch` on."""
    from pivot_megatron.train import reference, trainer

    config, begun = load_config(config_file), 0
    with pytest.MonkeyPatch.context() as patch, trainer.watched(config):
        patch.setattr(reference, "SAMPLES_A_PART", 16)
        _, arch, loader = trainer.described(config, config.model)
        start = start_fingerprint(config.model, config.seed)

        def before_batch() -> None:
            nonlocal begun
            begun += 1
            if begun == batch:
                other.files(make=True)

        one, other = (
            reference.ReferencePass(config, arch, config.model, start, loader, called)
            for called in (before_batch, lambda: None)
        )
        one.files(make=True)
    assert begun >= batch


@matrix.layouts(matrix.TP2, matrix.PP2, matrix.DP2)
def test_cached_equals_online_whatever_layout_made_it(layout, world, data: Path, tmp_path: Path, workers: Workers) -> None:
    forget(data)
    workers.run(make_at, None, world, config(data, tmp_path / "cached"), layout)
    (file,) = made(data)
    assert len(pq.read_table(file)) == 40
    before = file.stat().st_mtime_ns
    workers.run(train_at, None, 1, config(data, tmp_path / "cached"), Layout())
    workers.run(train_at, None, 1, config(data, tmp_path / "online", reference="online"), Layout())
    assert file.stat().st_mtime_ns == before
    for cached, online in zip(losses(tmp_path / "cached"), losses(tmp_path / "online"), strict=True):
        # The reference model runs over other packs, so that float32 rounds otherwise: log-probs of some 30 in all.
        assert cached == pytest.approx(online, rel=1e-5, abs=1e-5)


def test_made_where_missing_refused_where_stale(data: Path, tmp_path: Path, workers: Workers) -> None:
    forget(data)
    workers.run(train_at, None, 1, config(data, tmp_path / "a", steps=1, sequence_length=69), Layout())
    (file,) = made(data)
    longer = config(data, tmp_path / "b", steps=1)
    (message,) = workers.run(train_error, None, 1, longer, Layout())
    assert f"{file}: made at a sequence_length of 69, which left out 12 of this run's 40 samples" in message
    file.unlink()
    workers.run(train_at, None, 1, longer, Layout())
    before = file.stat().st_mtime_ns
    workers.run(train_at, None, 1, config(data, tmp_path / "c", steps=1, sequence_length=80), Layout())
    assert file.stat().st_mtime_ns == before  # what was made at a greater length serves a lesser one
    # Another way of reading images has a file of its own.
    workers.run(train_at, None, 1, config(data, tmp_path / "d", steps=1, image_backend="pil"), Layout())
    assert len(made(data)) == 2 and file.stat().st_mtime_ns == before
    table = pq.read_table(file)
    pq.write_table(table.slice(0, 30), file)
    (message,) = workers.run(train_error, None, 1, config(data, tmp_path / "e", steps=1), Layout())
    assert "incomplete: expected 40 samples" in message and "found 30" in message
    pq.write_table(table.replace_schema_metadata({b"pivot": table.schema.metadata[b"pivot"].replace(b'"shards": "', b'"shards": "0')}), file)
    (message,) = workers.run(train_error, None, 1, config(data, tmp_path / "f", steps=1), Layout())
    assert f"{file}: stale: made with shards 0" in message and "delete it" in message


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_runs_that_make_the_same_file_at_once(batch: int, data: Path, tmp_path: Path, workers: Workers) -> None:
    """As those of a sweep do, each when it begins. The file of the first stays, or an equal one takes its place."""
    forget(data)
    workers.run(make_beside_another, None, 1, config(data, tmp_path / "a"), batch)
    (file,) = made(data)
    assert len(pq.read_table(file)) == 40
    workers.run(train_at, None, 1, config(data, tmp_path / "b", steps=1), Layout())


def test_parts_of_other_facts_are_not_taken(data: Path, tmp_path: Path, workers: Workers) -> None:
    """A pass that was broken off, at another length: its parts go once the file is there, and so do broken ones."""
    forget(data)
    workers.run(train_at, None, 1, config(data, tmp_path / "a", steps=1), Layout())
    (file,) = made(data)
    whole = pq.read_table(file)
    facts = facts_of(file)
    file.unlink()
    for name, content in ((facts.parts, b"cut o"), (replace(facts, sequence_length=64).parts, b"")):
        assert name != file.name
        (data / "pairs" / name).mkdir()
        (data / "pairs" / name / "000000000.parquet").write_bytes(content)
    workers.run(train_at, None, 1, config(data, tmp_path / "b", steps=1), Layout())
    assert made(data) == [file] and pq.read_table(file).equals(whole)


def test_a_folder_that_cannot_be_written_to(data: Path, tmp_path: Path, workers: Workers) -> None:
    forget(data)
    workers.run(train_at, None, 1, config(data, tmp_path / "d", steps=1), Layout())
    (file,) = made(data)
    facts = facts_of(file)
    file.unlink()
    in_the_way = file.with_name(facts.parts)
    in_the_way.write_text("where a folder should be")
    (message,) = workers.run(train_error, None, 1, config(data, tmp_path / "e", steps=1), Layout())
    in_the_way.unlink()
    assert "cannot write reference log-probs beside the shards" in message and "reference: online" in message


def test_sft_has_no_reference(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = config_tree(data, tmp_path / "run")
    tree["objective"] = {"kind": "sft"}
    assert main(["reference", str(write_config(tmp_path / "sft.yaml", tree))]) == 2
    assert "objective.kind: sft compares with no reference" in capsys.readouterr().err
