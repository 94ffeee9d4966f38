"""Questions about an image with a better and a worse answer, and the region that they are about."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pivot_megatron.data.images import ImageError, decode_rgb
from pivot_megatron.data.pair_set import PairSet
from pivot_megatron.data.sample import BadSample, Pair, parse_sample
from pivot_megatron.errors import RunError, UserError
from pivot_megatron.probe.patch_grid import Box

_FIELDS = frozenset(("image", "question", "chosen", "rejected", "box"))


@dataclass(frozen=True)
class Question:
    """`name`: for errors and figures. `image`: encoded. `size`: its width and height in pixels."""

    name: str
    pair: Pair
    image: bytes
    size: tuple[int, int]
    box: Box | None


def read_questions(where: Path, count: int | None = None) -> list[Question]:
    """The first `count`, or all, of a file of JSON lines with `image` (a path from the file's folder), `question`, `chosen`,
    `rejected` and, if it has one, `box` (left, top, right, bottom in pixels); or of the pairs with one image in a folder of this
    project's shards, which have no boxes. Raises UserError naming what is not so, and where there are fewer, or none."""
    if count is not None and count < 1:
        raise UserError(f"--count: expected 1 or more, found {count}")
    found = list(islice(_of_shards(where) if where.is_dir() else _of_lines(where), count))
    if len(found) < (count or 1):
        raise UserError(
            f"{where}: expected {count or 'one or more'} pairs with an image, found {len(found)}"
            + ("; lower --count" if count else "")
        )
    return found


def _of_lines(file: Path) -> Iterator[Question]:
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise UserError(
            f"{file}: expected a file of JSON lines, or a folder of shards, found none ({error.strerror})"
        ) from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _of_line(file, f"{file}: line {number}", line)


def _of_line(file: Path, name: str, line: bytes) -> Question:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{name}: expected JSON, found something else ({error})") from None
    if not isinstance(record, dict):
        raise UserError(f"{name}: expected an object, found {type(record).__name__}")
    if odd := sorted(record.keys() - _FIELDS):
        raise UserError(f"{name}: expected {', '.join(sorted(_FIELDS))}, found {odd[0]!r}")
    if not isinstance(record.get("image"), str):
        raise UserError(f"{name}: expected a path in 'image', found {record.get('image')!r}")
    path = file.parent / record["image"]
    try:
        image = path.read_bytes()
    except OSError as error:
        raise UserError(f"{name}: {path}: cannot read the image ({error.strerror})") from None
    try:
        pair = parse_sample(name, line, image)
    except BadSample as error:
        raise UserError(f"{name}: {error.detail}") from None
    return _question(name, pair, record)


def _of_shards(folder: Path) -> Iterator[Question]:
    samples = PairSet.open([folder])
    for index in range(len(samples)):
        try:
            sample = samples.read(index)
        except (BadSample, RunError) as error:
            raise UserError(f"{folder}: {error}") from None
        if isinstance(sample, Pair) and sample.image is not None and sample.rejected_image is None:
            yield _question(f"{folder}: {sample.key}", sample, {})


def _question(name: str, pair: Any, record: Mapping[str, Any]) -> Question:
    try:
        size = decode_rgb(pair.image).size
    except ImageError as error:
        raise UserError(f"{name}: not an image that can be read ({error.detail})") from None
    told = record.get("box")
    return Question(name, pair, pair.image, size, None if told is None else _box(name, told, size))


def _box(name: str, told: Any, size: tuple[int, int]) -> Box:
    width, height = size
    numbers = (
        isinstance(told, list) and len(told) == 4 and all(type(n) in (int, float) and math.isfinite(n) for n in told)
    )
    if not numbers or not (0 <= told[0] < told[2] <= width and 0 <= told[1] < told[3] <= height):
        raise UserError(
            f"{name}: box: expected [left, top, right, bottom] in pixels within the image's {width} x {height}, found {told}"
        )
    return Box(*map(float, told))
