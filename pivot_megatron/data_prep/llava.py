"""LLaVA's rows: `{"id", "image", "conversations": [{"from": "human"|"gpt", "value"}]}`, in tables of any kind.

LLaVA-558K and LLaVA-NeXT are a JSON list, Cambrian is JSON lines, LLaVA-OneVision is parquet with the images inside.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pivot_megatron.data.sample import BadSample
from pivot_megatron.data_prep.rows import Row, image_path, key_names, row_key, single_image
from pivot_megatron.data_prep.sampling import Times
from pivot_megatron.data_prep.tables import Table


@dataclass(frozen=True)
class Part:
    """A table, how often each of its rows is taken, and the folder its image paths are relative to."""

    table: Table
    times: Times
    images: Path


class LlavaRows:
    """The rows of several tables, one table after another, each in its own order; repeats of a row follow it."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._names = key_names(part.table.name for part in parts)

    def __len__(self) -> int:
        return sum(int(part.times.sum()) for part in self._parts)

    @property
    def files(self) -> Sequence[Path]:
        return [file for part in self._parts for file in part.table.files]

    @property
    def parts(self) -> Mapping[str, Mapping[str, Any]]:
        """Of each table, by the name its keys begin with: where its images are, its rows, how many are taken and which."""
        return {
            name: {
                "images": str(part.images),
                "rows": len(part.table),
                "taken": int(part.times.sum()),
                "choice": hashlib.sha256(part.times.tobytes()).hexdigest()[:16],
            }
            for part, name in zip(self._parts, self._names, strict=True)
        }

    def __iter__(self) -> Iterator[Row | BadSample]:
        for part, name in zip(self._parts, self._names, strict=True):
            times = part.times.tolist()
            for position, row in part.table.read([count > 0 for count in times]):
                for copy in range(times[position]):
                    yield _row(row_key(name, position, copy), row, part.images)


def _row(key: str, row: Any, images: Path) -> Row | BadSample:
    if not isinstance(row, dict):
        return BadSample(key, "bad_json", f"expected an object, found {type(row).__name__}: {str(row)[:80]!r}")
    try:
        image = _image(key, single_image(key, row.get("image")), images)
    except BadSample as refusal:
        return refusal
    return Row(key, {name: value for name, value in row.items() if name != "image"}, image)


def _image(key: str, value: Any, images: Path) -> Path | bytes | None:
    if isinstance(value, dict):
        # Hugging Face's image feature: the bytes, or else the path of a file beside the data set.
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if value is None or isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return image_path(key, images, value)
    raise BadSample(key, "bad_image_field", f"expected a path or bytes in 'image', found {type(value).__name__}")
