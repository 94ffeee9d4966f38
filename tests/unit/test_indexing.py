"""`pivot data index`: what is broken is named, and the exit code says so; with --check nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pivot_megatron.bench.photos import photo
from pivot_megatron.cli import main
from pivot_megatron.data.shard_writer import ShardWriter
from pivot_megatron.data.shards import open_shards
from tests.unit.test_shards import jpeg, pair_json, record, write, write_tar

SOUND = {"a.json": pair_json(), "a.jpg": jpeg(1), "a.txt": b"", "b.json": pair_json()}


def test_a_foreign_folder_gets_an_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "x.tar", SOUND)
    write_tar(tmp_path / "y.tar", {"c.json": pair_json()})
    assert main(["data", "index", str(tmp_path), "--workers", "2"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{tmp_path}: 3 samples in 2 tars, ") and said[1:] == ["left alone: 1 members .txt"]
    assert open_shards(tmp_path).keys == ("a", "b", "c")


def test_what_is_broken_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also what a writer does not look for: an image that does not decode to its end."""
    with ShardWriter(tmp_path, 10) as writer:
        writer.write("cut", photo(64, 48, seed=1)[:-200], "jpg", record(1))
        writer.write("whole", jpeg(2), "jpg", record(2))
    assert not open_shards(tmp_path).known_bad
    assert main(["data", "index", str(tmp_path), "--workers", "0"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[1] == "broken: 1: 1 bad_image" and said[2].startswith("  sample cut: bad_image: ")
    assert [bad.key for bad in open_shards(tmp_path).known_bad] == ["cut"]
    assert main(["data", "index", str(tmp_path), "--workers", "0", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["samples"], [(bad["key"], bad["reason"]) for bad in found["bad"]]) == (2, [("cut", "bad_image")])


def test_a_check_compares_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(["data", "index", str(tmp_path), "--check", "--workers", "0"]) == 0
    tar = tmp_path / "shard-000001.tar"
    data = bytearray(tar.read_bytes())
    data[data.index(b"Gr")] ^= 1  # a bit of a question, which stays a question
    tar.write_bytes(data)
    capsys.readouterr()
    assert main(["data", "index", str(tmp_path), "--check", "--workers", "0"]) == 1
    assert "changed: shard-000001.tar: expected SHA-256" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before | {tar.name: bytes(data)}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "expected tar files in"),
        (("--workers", "-1"), "--workers: expected 0 or more, found -1"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], said: str
) -> None:
    assert main(["data", "index", str(tmp_path / "none"), *options]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_check_needs_an_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "x.tar", SOUND)
    assert main(["data", "index", str(tmp_path), "--check"]) == 2
    assert "found none: run: pivot data index" in capsys.readouterr().err
