"""What every source gives: rows to be written, or the reason why one cannot be."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from pivot_megatron.data.sample import BadSample
from pivot_megatron.errors import UserError


@dataclass(frozen=True)
class Row:
    """A sample before its image was looked at.

    `record` is what the shard's JSON will hold. `image`: where the encoded image lies, or its bytes; None for text only.
    """

    key: str
    record: Mapping[str, Any]
    image: Path | bytes | None


class Source(Protocol):
    """Rows in an order that is the same every time; `len` counts those refused too."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Row | BadSample]: ...

    @property
    def files(self) -> Sequence[Path]:
        """What is read, images aside: if one of them changes, half a preparation cannot go on."""
        ...


Check = Callable[[Row], None]
"""Raises BadSample for a row that is not wanted; its record is sound."""


def image_path(key: str, root: Path, name: str) -> Path:
    """The file `name` below `root`. Raises BadSample `image_outside_root` for a name that leads out of it."""
    inside = os.path.normpath(name)
    if PurePosixPath(inside).is_absolute() or inside.split(os.sep, 1)[0] == os.pardir:
        raise BadSample(key, "image_outside_root", f"expected a path below {root}, found {name!r}")
    return root / inside


def single_image(key: str, value: Any) -> Any:
    """A row's `image` field: of a list its only entry, None for no image. Raises BadSample `multi_image`."""
    if isinstance(value, list):
        if len(value) > 1:
            raise BadSample(key, "multi_image", f"expected at most one image, found {len(value)}")
        value = value[0] if value else None
    return None if value == "" else value


def key_names(names: Iterable[str]) -> list[str]:
    """The names as beginnings of keys, in which WebDataset allows no dots, and each another."""
    made: list[str] = []
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9-]+", "_", name).strip("_") or "rows"
        found, number = plain, 1
        while found in made:
            number += 1
            found = f"{plain}-{number}"
        made.append(found)
    return made


def row_key(name: str, position: int, copy: int = 0) -> str:
    """`copy`: which of a repeated row's times this is."""
    return f"{name}-{position:08d}" + (f"-r{copy}" if copy else "")


def require_folder(path: Path, option: str) -> Path:
    """Raises UserError."""
    if not path.is_dir():
        raise UserError(f"{option}: expected a folder, found {'a file' if path.exists() else 'nothing'} at {path}")
    return path
