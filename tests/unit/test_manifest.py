"""A checkpoint's list of files sees every damage, and names the file."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pivot_megatron.checkpoints import manifest
from pivot_megatron.checkpoints.folder import FORMAT, opened
from pivot_megatron.checkpoints.manifest import (
    BLOCK,
    Block,
    CheckedAhead,
    Manifest,
    Sum,
    blocks_of_range,
    sum_file,
)
from pivot_megatron.errors import UserError
from tests.checkpoints import flip, hollow, list_again


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return hollow(tmp_path, 8, loss=0.5)


def damage(checkpoint: Path) -> str:
    with pytest.raises(UserError) as found:
        listed = opened(checkpoint)
        listed.require_sound(checkpoint, listed.blocks(listed.files))
    message = str(found.value)
    assert "\n" not in message
    return message


@settings(deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=12), st.integers(1, 30))
def test_checksums_are_the_same_however_a_file_is_written(pieces: list[bytes], block: int) -> None:
    """Against zlib over each block of the whole."""
    whole = b"".join(pieces)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "BLOCK", block)
        found = Sum()
        for piece in pieces:
            found.add(piece)
    assert found.done().bytes == len(whole)
    assert found.done().crc32 == tuple(zlib.crc32(whole[i : i + block]) for i in range(0, len(whole), block))


def test_a_file_of_several_blocks(tmp_path: Path) -> None:
    """A bit that turns in the second block is found there, and the first is still sound by itself."""
    out = hollow(tmp_path, 8)
    path = out / "tensors" / "__0_0.distcp"
    with path.open("wb") as file:
        file.truncate(BLOCK + 1000)
    list_again(out)
    listed = opened(out)
    name = "tensors/__0_0.distcp"
    assert listed.blocks([name]) == [Block(name, 0), Block(name, 1)]
    listed.require_sound(out, listed.blocks([name]))
    with path.open("r+b") as file:
        file.seek(BLOCK + 5)
        file.write(b"\1")
    opened(out).require_sound(out, [Block(name, 0)])
    ahead = CheckedAhead(out, opened(out))
    ahead.require([Block(name, 0)])  # which looks at the next one too
    for require in (lambda: ahead.require([Block(name, 1)]), lambda: opened(out).require_sound(out, [Block(name, 1)])):
        with pytest.raises(UserError, match=f"{name}: expected CRC-32 .* of the 1000 bytes from {BLOCK} on"):
            require()


@settings(deadline=None)
@given(st.integers(0, 5 * BLOCK), st.integers(1, 3 * BLOCK))
def test_a_range_lies_in_its_blocks(start: int, length: int) -> None:
    numbers = [block.number for block in blocks_of_range("f", start, length)]
    assert numbers == sorted({start // BLOCK, (start + length - 1) // BLOCK} | set(numbers))
    assert numbers[0] * BLOCK <= start and start + length <= (numbers[-1] + 1) * BLOCK
    assert numbers[-1] - numbers[0] == len(numbers) - 1 and numbers[-1] * BLOCK < start + length


@pytest.mark.parametrize("name", ["model.json", "saved.json", "tensors/__0_0.distcp"])
def test_any_bit_of_any_file(name: str, checkpoint: Path) -> None:
    path = checkpoint / name
    whole = path.read_bytes()
    for at in range(len(whole)):
        flip(path, at)
        message = damage(checkpoint)
        assert str(path if "CRC" in message else checkpoint) in message, (at, message)
        path.write_bytes(whole)
    opened(checkpoint)


@pytest.mark.parametrize("name", ["saved.json", "tensors/__0_0.distcp"])
def test_a_file_cut_off_or_gone(name: str, checkpoint: Path) -> None:
    path = checkpoint / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert f"{path}: expected {len(whole)} bytes, found {len(whole) - 1}" in damage(checkpoint)
    path.unlink()
    assert f"{path}: expected {len(whole)} bytes, found no such file" in damage(checkpoint)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"files": 3}', '{"files": {"a": {}}}', '{"files": {"a": 1}}'])
def test_a_list_that_is_none(text: str, checkpoint: Path) -> None:
    (checkpoint / "files.json").write_text(text)
    assert f"{checkpoint / 'files.json'}: expected the list" in damage(checkpoint)
    (checkpoint / "files.json").unlink()
    assert f"{checkpoint / 'files.json'}: expected the list" in damage(checkpoint)


def test_an_older_format_says_so_first(checkpoint: Path) -> None:
    (checkpoint / "files.json").unlink()
    (checkpoint / "model.json").write_text(json.dumps({"format": FORMAT - 1}))
    assert damage(checkpoint) == f"{checkpoint}: checkpoint format {FORMAT - 1}, this version reads {FORMAT}"


def test_a_copy_is_as_good(checkpoint: Path, tmp_path: Path) -> None:
    """And files that somebody put beside are no damage."""
    shutil.copytree(checkpoint, tmp_path / "copy")
    (tmp_path / "copy" / "notes.txt").write_text("mine")
    listed = opened(tmp_path / "copy")
    listed.require_sound(tmp_path / "copy", listed.blocks(listed.files))
    assert listed == Manifest.read(checkpoint)


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert sum_file(tmp_path / "empty").bytes == 0 and not sum_file(tmp_path / "empty").crc32
