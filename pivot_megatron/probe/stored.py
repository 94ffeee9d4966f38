"""Images on a disk: files, and members of WebDataset tars with a text beside each, as ImageNet's classes and captions are."""

from __future__ import annotations

import glob
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pivot_megatron.errors import UserError
from pivot_megatron.probe.kept import kept_together, made_by

EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"))


@dataclass(frozen=True)
class StoredImage:
    """`size` bytes from `offset` on of the file `path`. `name`: for errors. `text`: what is told of it, stripped. `stamp`:
    when the file was written last, in nanoseconds."""

    name: str
    text: str
    path: Path
    offset: int
    size: int
    stamp: int

    @property
    def facts(self) -> tuple[str, str, int, int]:
        """Equal for equal images, without their being read."""
        return self.name, self.text, self.size, self.stamp

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def image_file(path: Path, text: str) -> StoredImage:
    told = path.stat()
    return StoredImage(str(path), text, path, 0, told.st_size, told.st_mtime_ns)


def tars_at(where: Path) -> list[Path]:
    """As `files_at`."""
    return files_at(where, "tar", "tar")


def files_at(where: Path, extension: str, kind: str) -> list[Path]:
    """The files of a folder, or those that a pattern fits such as `imagenet/*-train-*.tar`, in order. `kind`: of files, for
    errors. Raises UserError where there is no such folder, or nothing fits."""
    if where.is_dir():
        return sorted(where.glob(f"*.{extension}"))
    found = sorted(Path(name) for name in glob.glob(str(where)))  # noqa: PTH207  (an absolute pattern)
    if not found:
        raise UserError(
            f"{where}: no such folder, and no {kind} that fits; give a folder, or a quoted pattern of {kind}s"
        )
    if odd := [path for path in found if not path.is_file()]:
        raise UserError(f"{where}: expected a pattern of {kind}s, and {odd[0]} is none")
    return found


def images_beside(tar: Path, extension: str, cache: Path | None = None) -> Iterator[StoredImage]:
    """Each KEY.jpg (or another image) with its KEY.`extension`, in order. `cache`: a folder that keeps what a tar holds, for the
    next time that it is as long and as old; for short texts, which take the room of the longest. Raises UserError for an image
    without its text, for two of one key, and for a tar that cannot be read."""
    try:
        stat = tar.stat()
    except OSError as error:
        raise _unreadable(tar, error) from None
    told = f"{tar.resolve()} {stat.st_size} {stat.st_mtime_ns} {extension} {made_by(__file__)}"
    found = kept_together(lambda: _listed(tar, extension), cache, told)
    for key, text, offset, size in zip(*(found[name].tolist() for name in _LISTED), strict=True):
        yield StoredImage(f"{tar}: {key}", text, tar, offset, size, stat.st_mtime_ns)


_LISTED = ("keys", "texts", "offsets", "sizes")


def _listed(tar: Path, extension: str) -> dict[str, npt.NDArray[Any]]:
    """_LISTED, `[images]` each: a tar has no index, so every header of it is read."""
    images: dict[str, tuple[int, int]] = {}
    texts: dict[str, str] = {}
    try:
        with tarfile.open(tar, "r:") as file:
            for member in file:
                folder, slash, base = member.name.rpartition("/")
                key, _, kind = base.partition(".")
                key = folder + slash + key
                if f".{kind.lower()}" in EXTENSIONS:
                    if key in images:
                        raise UserError(f"{tar}: {key}: expected one image a key, found another in {member.name}")
                    images[key] = (member.offset_data, member.size)
                elif kind == extension and (content := file.extractfile(member)):
                    texts[key] = content.read().decode().strip()
    except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
        raise _unreadable(tar, error) from None
    if lone := [key for key in images if key not in texts]:
        raise UserError(f"{tar}: {lone[0]}: expected {lone[0]}.{extension} beside the image, found none")
    places = np.array(list(images.values()), np.int64).reshape(-1, 2)
    words = (np.array(one, np.str_) for one in (list(images), [texts[key] for key in images]))
    return dict(zip(_LISTED, (*words, places[:, 0], places[:, 1]), strict=True))


def _unreadable(tar: Path, error: Exception) -> UserError:
    return UserError(f"{tar}: not a tar that can be read ({error}); fetch it again")
