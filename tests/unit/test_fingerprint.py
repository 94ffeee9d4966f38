"""What a run begins from has a name by its content, and a run that goes on from something else is refused."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pivot_megatron.config.schema import AnyRes, Component, Encoder, Model, Projector
from pivot_megatron.convert import digests
from pivot_megatron.convert.commands import import_checkpoint
from pivot_megatron.convert.digests import file_digest
from pivot_megatron.convert.fingerprint import start_fingerprint
from pivot_megatron.convert.tiny_checkpoints import make_encoder, make_head, make_tokenizer
from pivot_megatron.errors import UserError
from pivot_megatron.train.begun import require_begun


@pytest.fixture
def parts(tmp_path: Path) -> Model:
    make_encoder(tmp_path / "encoder", image_size=32, patch_size=16, hidden_size=32, layers=2, heads=4, ffn=48, seed=1)
    tokenizer = make_tokenizer(iter(["some words"]), 300)
    make_head(tmp_path / "llm", tokenizer, hidden_size=32, layers=1, heads=4, kv_heads=2, ffn=64, tied=True, seed=2)
    return Model(Encoder(hf=tmp_path / "encoder"), Component(hf=tmp_path / "llm"))


def differing(one: dict[str, str], other: dict[str, str]) -> set[str]:
    return {name for name in one if one[name] != other[name]}


def test_every_part_has_a_name_by_what_is_in_it(parts: Model, tmp_path: Path) -> None:
    first = start_fingerprint(parts, 1)
    assert first == start_fingerprint(parts, 1) and differing(first, start_fingerprint(parts, 2)) == {"projector"}
    shutil.move(tmp_path / "llm", tmp_path / "elsewhere")
    moved = replace(parts, llm=Component(hf=tmp_path / "elsewhere"))
    assert start_fingerprint(moved, 1) == first
    for file, change, part in (
        ("elsewhere/model.safetensors", b"\x01", {"llm"}),
        ("encoder/model.safetensors", b"\x01", {"encoder"}),
        ("elsewhere/tokenizer_config.json", b" ", {"tokenizer"}),
    ):
        before, path = start_fingerprint(moved, 1), tmp_path / file
        path.write_bytes(path.read_bytes()[:-1] + change if change != b" " else path.read_bytes() + change)
        assert differing(before, start_fingerprint(moved, 1)) == part
    fresh = replace(moved, encoder=Encoder(fresh=tmp_path / "encoder"))
    assert differing(start_fingerprint(fresh, 1), start_fingerprint(fresh, 2)) == {"encoder", "projector"}


def test_what_a_checkpoint_does_not_give_is_named_by_the_seed(parts: Model, tmp_path: Path) -> None:
    """The newline of tiles on a projector of squares, the second linear of one that keeps the first alone."""
    import_checkpoint(tmp_path / "encoder", tmp_path / "llm", tmp_path / "start", None, 7)
    start = Component(checkpoint=tmp_path / "start")
    whole = Model(Encoder(checkpoint=start.checkpoint), start, Projector(checkpoint=start.checkpoint))
    assert start_fingerprint(whole, 1) == start_fingerprint(whole, 2)
    tiled = replace(whole, anyres=AnyRes())
    half = replace(whole, projector=Projector(checkpoint=start.checkpoint, keep="first"))
    for drawn in (tiled, half):
        assert differing(start_fingerprint(drawn, 1), start_fingerprint(drawn, 2)) == {"projector"}
    names = {start_fingerprint(one, 1)["projector"] for one in (whole, tiled, half, replace(half, anyres=AnyRes()))}
    assert len(names) == 4


def test_a_start_that_changed_is_named(parts: Model, tmp_path: Path) -> None:
    import_checkpoint(tmp_path / "encoder", tmp_path / "llm", tmp_path / "start", None, 7)
    start = replace(parts, encoder=Encoder(checkpoint=tmp_path / "start"))
    begun = start_fingerprint(start, 1)
    require_begun(begun, start, start_fingerprint(start, 1))
    shutil.rmtree(tmp_path / "start")
    import_checkpoint(tmp_path / "encoder", tmp_path / "llm", tmp_path / "start", None, 7)
    (tmp_path / "llm" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError) as told:
        require_begun(begun, start, found := start_fingerprint(start, 1))
    assert str(told.value).splitlines() == [
        f"model.encoder.checkpoint: {tmp_path / 'start'}: expected weights {begun['encoder'][:16]}, which the run began from, "
        f"found {found['encoder'][:16]}; restore what was there, or use a new `out`",
        f"model.llm.hf: {tmp_path / 'llm'}: expected a tokenizer {begun['tokenizer'][:16]}, which the run began from, "
        f"found {found['tokenizer'][:16]}; restore what was there, or use a new `out`",
    ]


def test_a_large_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And again where anything says that it may be another: also one that was overwritten in place and given its old date."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "LARGE", 4)
    read: list[Path] = []
    hashed = digests._read
    monkeypatch.setattr(digests, "_read", lambda path: (read.append(path), hashed(path))[1])
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"abc")
    large.write_bytes(b"abcd")
    first = file_digest(large)
    assert file_digest(large) == first and len(read) == 2  # so fresh that a change might have the same time
    monkeypatch.setattr(digests, "_SETTLED", -1.0)
    assert file_digest(small) == file_digest(small) and read.count(small) == 2
    read.clear()
    assert [file_digest(large) for _ in range(3)] == [first] * 3 and len(read) == 1
    before = large.stat()
    with large.open("r+b") as file:
        file.write(b"dcba")
    os.utime(large, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert large.stat().st_mtime_ns == before.st_mtime_ns and file_digest(large) != first and len(read) == 2
    (note,) = (tmp_path / "cache").rglob("*.json")
    note.write_text(json.dumps({"stamp": "odd"}))
    file_digest(large)
    assert len(read) == 3
    with pytest.raises(UserError, match="cannot read"):
        file_digest(tmp_path / "none")
