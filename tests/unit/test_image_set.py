"""Labelled images from folders and tars."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from pivot_megatron.errors import UserError
from pivot_megatron.probe import stored
from pivot_megatron.probe.image_set import ImageSet


def folders(at: Path) -> Path:
    for name in ("tench/b.JPEG", "tench/a.png", "goldfish/deep/c.jpg", "tench/notes.txt"):
        (at / name).parent.mkdir(parents=True, exist_ok=True)
        (at / name).write_bytes(name.encode())
    return at


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def test_a_folder_of_folders(tmp_path: Path) -> None:
    found = ImageSet.opened(folders(tmp_path))
    assert found.classes == ("goldfish", "tench") and found.labels.tolist() == [0, 1, 1]
    assert [found.read(n) for n in range(3)] == [b"goldfish/deep/c.jpg", b"tench/a.png", b"tench/b.JPEG"]
    again = ImageSet.opened(tmp_path)
    assert again.fingerprint == found.fingerprint
    (tmp_path / "tench" / "a.png").write_bytes(b"longer than it was")
    assert ImageSet.opened(tmp_path).fingerprint != found.fingerprint


def test_tars_with_classes_that_are_numbers(tmp_path: Path) -> None:
    tar(
        tmp_path / "val-0.tar",
        {"x1.jpg": b"one", "x1.cls": b"10", "x1.json": b"{}", "x2.cls": b"9\n", "x2.jpg": b"two"},
    )
    tar(tmp_path / "val-1.tar", {"x3.jpg": b"three", "x3.cls": b"100"})
    found = ImageSet.opened(tmp_path)
    assert found.classes == ("9", "10", "100") and found.labels.tolist() == [1, 0, 2]
    assert [found.read(n) for n in range(3)] == [b"one", b"two", b"three"]
    assert found.names[1] == f"{tmp_path / 'val-0.tar'}: x2"


def test_tars_of_a_pattern(tmp_path: Path) -> None:
    """As ImageNet is published: the tars of both splits in one folder."""
    tar(tmp_path / "imagenet1k-train-0000.tar", {"x1.jpg": b"one", "x1.cls": b"0"})
    tar(tmp_path / "imagenet1k-validation-00.tar", {"x2.jpg": b"two", "x2.cls": b"0"})
    found = ImageSet.opened(tmp_path / "imagenet1k-val*.tar")
    assert len(found) == 1 and found.read(0) == b"two"
    with pytest.raises(UserError, match=r"x2: expected one image a key, found another in x2\.png"):
        tar(tmp_path / "imagenet1k-validation-00.tar", {"x2.jpg": b"two", "x2.png": b"three", "x2.cls": b"0"})
        ImageSet.opened(tmp_path / "imagenet1k-val*.tar")


def test_a_tar_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And again where it is another."""
    listed: list[Path] = []
    opened = tarfile.open
    monkeypatch.setattr(stored.tarfile, "open", lambda path, *rest: listed.append(path) or opened(path, *rest))
    (tmp_path / "tars").mkdir()
    one, two = (
        tar(tmp_path / "tars" / name, {"\u00e9.jpg": b"one", "\u00e9.cls": b"7 "}) for name in ("a.tar", "b.tar")
    )
    empty = tar(tmp_path / "tars" / "c.tar", {"notes.txt": b"none"})
    listed.clear()
    found, again = (ImageSet.opened(tmp_path / "tars", tmp_path / "kept") for _ in range(2))
    assert listed == [one, two, empty]
    assert again.names == found.names == (f"{one}: \u00e9", f"{two}: \u00e9") and again.fingerprint == found.fingerprint
    assert again.classes == ("7",) and again.read(1) == b"one"
    tar(two, {"x.jpg": b"other", "x.cls": b"7"})
    os.utime(two, ns=(1, 1))
    listed.clear()
    assert ImageSet.opened(tmp_path / "tars", tmp_path / "kept").names[1] == f"{two}: x" and listed == [two]
    ImageSet.opened(tmp_path / "tars")
    assert listed[1:] == [one, two, empty]  # without a folder to keep it in


def test_an_image_written_again_is_another(tmp_path: Path) -> None:
    before = ImageSet.opened(folders(tmp_path)).fingerprint
    file = tmp_path / "tench" / "a.png"
    file.write_bytes(file.read_bytes()[::-1])  # as long as it was
    os.utime(file, ns=(1, 1))
    assert ImageSet.opened(tmp_path).fingerprint != before


def test_what_is_neither(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder, and no tar that fits"):
        ImageSet.opened(tmp_path / "nowhere")
    with pytest.raises(UserError, match="found no image and no tar"):
        ImageSet.opened(tmp_path)
    tar(tmp_path / "a.tar", {"x1.jpg": b"one"})
    with pytest.raises(UserError, match=r"x1: expected x1\.cls"):
        ImageSet.opened(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"not a tar" * 100)
    with pytest.raises(UserError, match="not a tar that can be read"):
        ImageSet.opened(tmp_path)
