"""Damage of a folder and its index, and of files while a run reads them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.damage.kinds import RECORD, Kind, among, base, encoded, files, look, member

Spoil = Callable[[Path], None]

ODD = among(lambda: _odd())


def _odd(record: Any = RECORD) -> bytes:
    return member("odd.json", record) + member("odd.png", encoded(look(), "PNG"))


def refused(indexed: Spoil, says: str, mended: bool = True, write: Spoil = ODD) -> Kind:
    return Kind(write, "refused", says=says, mended=mended, indexed=indexed)


def unindexed(after: Spoil, says: str) -> Kind:
    def write(folder: Path) -> None:
        files(base)(folder)
        after(folder)

    return Kind(write, "unindexed", says=says)


def stops(opened: Spoil, says: str) -> Kind:
    return Kind(ODD, "stops", opened=opened, says=says)


def bad(opened: Spoil, *reasons: str) -> Kind:
    return Kind(ODD, "bad", {"odd": reasons}, seen="run", opened=opened)


def sound(indexed: Spoil | None = None, opened: Spoil | None = None) -> Kind:
    return Kind(ODD, "sound", key="odd", shown=look, indexed=indexed, opened=opened)


def written(name: str, data: bytes | str) -> Spoil:
    return lambda folder: (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode()) and None


def gone(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


def cut(name: str, share: float) -> Spoil:
    return lambda folder: os.truncate(folder / name, round((folder / name).stat().st_size * share))


def index_says(change: Callable[[Any], Any]) -> Spoil:
    """Another index.json."""

    def spoil(folder: Path) -> None:
        path = folder / "index.json"
        about = json.loads(path.read_text())
        path.write_text(json.dumps(change(about) or about))

    return spoil


def longer(folder: Path) -> None:
    with (folder / "x.tar").open("ab") as file:
        file.write(bytes(512))


def folder_for(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return spoil


def flipped(folder: Path) -> None:
    path = folder / "index.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def index_of_other_samples(*names: str) -> Spoil:
    """Files of the index that the same tars have with one sample less."""

    def spoil(folder: Path) -> None:
        from pivot_megatron.data.index import index_tar, tars_of, write_index

        other = folder.parent / f"{folder.name}-other"
        files(base)(other)
        write_index(other, [index_tar(tar, decode=False) for tar in tars_of(other)])
        for name in names:
            (other / name).replace(folder / name)
        shutil.rmtree(other)

    return spoil


def within(part: str, change: Callable[[bytes], bytes]) -> Spoil:
    """Bytes of odd's `part` in x.tar changed in place, their number kept."""

    def spoil(folder: Path) -> None:
        path = folder / "x.tar"
        data = path.read_bytes()
        old = _content(part)
        new = change(old)
        assert len(new) == len(old) and data.count(old) == 1
        with path.open("r+b") as file:
            file.seek(data.index(old))
            file.write(new)

    return spoil


def _content(part: str) -> bytes:
    return json.dumps(RECORD).encode() if part == "json" else encoded(look(), "PNG")


def smaller_image(old: bytes) -> bytes:
    return encoded(look(size=(24, 48)), "PNG").ljust(len(old), b"\0")


def as_another(old: bytes) -> bytes:
    """A sound sample of as many bytes that says something else."""
    return old.replace(b"a red circle", b"a tan circle")


def both_gone(folder: Path) -> None:
    """A tar and its line in index.json, as a person would remove them."""
    (folder / "y.tar").unlink()
    index_says(lambda about: about["shards"].pop() and None)(folder)


INDEX = {
    "missing": refused(gone("index.json"), "found none"),
    "empty": refused(written("index.json", ""), "something else"),
    "cut": refused(cut("index.json", 0.5), "something else"),
    "zeros": refused(written("index.json", bytes(500)), "something else"),
    "a-list": refused(written("index.json", "[]"), "something else"),
    "deep-nesting": refused(written("index.json", "[" * 100_000), "something else"),
    "not-utf-8": refused(written("index.json", b"\xff\xfe\xfd"), "something else"),
    "a-folder": refused(folder_for("index.json"), "index.json", mended=False),
    "of-version-1": refused(index_says(lambda about: about | {"version": 1}), "version"),
    "of-a-later-version": refused(index_says(lambda about: about | {"version": 99}), "version"),
    "without-shards": refused(index_says(lambda about: about | {"shards": []}), "x.tar"),
    "shards-are-text": refused(index_says(lambda about: about | {"shards": "x.tar"}), "something else"),
    "count-lies": refused(index_says(lambda about: about["shards"][0].update(samples=9)), "11 samples"),
    "count-is-text": refused(index_says(lambda about: about["shards"][0].update(samples="many")), "something else"),
    "size-lies": refused(index_says(lambda about: about["shards"][0].update(bytes=9)), "x.tar"),
    "tar-and-its-line-removed": refused(both_gone, "samples", mended=False),
    "climbs-out": refused(index_says(lambda about: about["shards"][0].update(name="../x.tar")), "x.tar"),
    "of-other-samples": refused(index_of_other_samples("index.json", "index.parquet"), "x.tar"),
    "half-of-other-samples": refused(index_of_other_samples("index.parquet"), "index.parquet"),
    "parquet-missing": refused(gone("index.parquet"), "index.parquet"),
    "parquet-empty": refused(written("index.parquet", ""), "index.parquet"),
    "parquet-cut": refused(cut("index.parquet", 0.9), "index.parquet"),
    "parquet-flipped-bit": refused(flipped, "index.parquet"),
    "tar-missing": refused(gone("y.tar"), "y.tar", mended=False),
    "tar-is-a-folder": refused(folder_for("y.tar"), "y.tar", mended=False),
    "tar-renamed": refused(lambda folder: (folder / "y.tar").rename(folder / "z.tar") and None, "z.tar"),
    "tar-more": refused(lambda folder: shutil.copy(folder / "y.tar", folder / "z.tar") and None, "z.tar", mended=False),
    "tar-longer": refused(longer, "x.tar"),
    "tar-shorter": refused(cut("x.tar", 0.5), "x.tar", mended=False),
    "folder-missing": refused(shutil.rmtree, "expected a folder", mended=False),
    "leftovers-beside": sound(written(".index.parquet.partial", b"half")),
}

FOLDERS = {
    "folder-named-like-a-tar": unindexed(folder_for("z.tar"), "z.tar"),
    "link-to-nowhere": unindexed(lambda folder: (folder / "z.tar").symlink_to("nowhere"), "z.tar"),
    "pipe-named-like-a-tar": unindexed(lambda folder: os.mkfifo(folder / "z.tar"), "z.tar"),
    "no-tars": unindexed(lambda folder: [tar.unlink() for tar in folder.glob("*.tar")] and None, "found none"),
    "link-to-a-tar": sound(lambda folder: _linked(folder)),
}


def _linked(folder: Path) -> None:
    (folder / "y.tar").rename(folder / "elsewhere")
    (folder / "y.tar").symlink_to("elsewhere")


LATER = {
    "json-garbage": bad(within("json", lambda old: b"\xa5" * len(old)), "bad_json"),
    "json-zeros": bad(within("json", lambda old: bytes(len(old))), "bad_json"),
    "answers-made-equal": bad(
        within("json", lambda old: json.dumps(RECORD | {"rejected": RECORD["chosen"]}).encode().ljust(len(old))),
        "identical_answers",
    ),
    "image-zeros": bad(within("png", lambda old: bytes(len(old))), "bad_image"),
    "image-flipped-bits": bad(within("png", lambda old: old[:80] + b"\xaa\x55" + old[82:]), "bad_image"),
    "image-of-another-size": bad(within("png", smaller_image), "bad_image"),
    "another-text": Kind(ODD, "unseen", key="odd", opened=within("json", as_another)),
    "tar-cut": stops(cut("x.tar", 0.01), "x.tar"),
    "tar-empty": stops(written("x.tar", b""), "x.tar"),
    "tar-removed": stops(gone("x.tar"), "x.tar"),
    "tar-is-a-folder": stops(folder_for("x.tar"), "x.tar"),
    "folder-removed": stops(shutil.rmtree, "tar"),
    "index-removed": sound(opened=gone("index.parquet")),
    "index-replaced": sound(opened=index_of_other_samples("index.json", "index.parquet")),
    "tar-added": sound(opened=lambda folder: shutil.copy(folder / "y.tar", folder / "z.tar") and None),
}
