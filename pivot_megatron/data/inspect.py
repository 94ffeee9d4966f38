"""What a folder of shards holds, in a few lines of text for a person."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median_low

from PIL import Image

from pivot_megatron.data.sample import BadSample, Pair, Sample
from pivot_megatron.data.shards import ShardReader
from pivot_megatron.errors import UserError

LOOKED_AT = 2000
"""Reading a sample reads its image too, so a large set is judged by this many of its samples, spread evenly."""

_IMAGES = 8
_WIDTH = 100


def describe_shards(folder: Path, samples: int) -> str:
    """Counts, kinds, images and text lengths of a folder of shards, and its first `samples` rows cut short.

    Raises UserError where the folder is no indexed folder of shards, and for a negative `samples`.
    """
    if samples < 0:
        raise UserError(f"--samples: expected 0 or more, found {samples}")
    reader = ShardReader(folder)
    tars = sorted(folder.glob("*.tar"))
    size = sum(tar.stat().st_size for tar in tars)
    lines = [f"{folder}: {_plural(len(reader), 'sample')} in {_plural(len(tars), 'tar')}, {size / 2**20:.1f} MiB"]
    positions = _spread(len(reader), LOOKED_AT)
    if len(positions) < len(reader):
        lines.append(f"looked at {len(positions):,} of them, spread evenly")
    tally = _Tally()
    for position in positions:
        tally.read(reader, position)
    lines += tally.lines()
    shown = range(min(samples, len(reader)))
    if shown:
        lines += ["", f"first {len(shown)}:" if len(shown) > 1 else "first:"]
        lines += [line for position in shown for line in _row(reader, position)]
    return "\n".join(lines)


def _spread(count: int, most: int) -> Sequence[int]:
    return [i * count // most for i in range(most)] if count > most else range(count)


@dataclass
class _Tally:
    """Of the samples read so far. Their images are not kept: a set's images need not fit in memory."""

    kinds: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)
    with_image: int = 0
    first_images: list[str] = field(default_factory=list)
    lengths: dict[str, list[int]] = field(default_factory=dict)

    def read(self, reader: ShardReader, position: int) -> None:
        try:
            sample = reader.read(position)
        except BadSample as error:
            self.broken[error.reason] += 1
            return
        self.kinds["pairs" if isinstance(sample, Pair) else "conversations"] += 1
        for name, text in _texts(sample):
            self.lengths.setdefault(name, []).append(len(text))
        if sample.image is not None:
            self.with_image += 1
            if len(self.first_images) < _IMAGES:
                self.first_images.append(_image_kind(sample.image))

    def lines(self) -> Iterator[str]:
        count = self.kinds.total()
        yield f"kinds: {', '.join(f'{n:,} {kind}' for kind, n in self.kinds.most_common()) or 'none'}"
        if self.broken:
            reasons = ", ".join(f"{n:,} {reason}" for reason, n in self.broken.most_common())
            yield f"broken: {reasons}; a run stops at the first of them"
        if count:
            yield f"with an image: {self.with_image:,} of {count:,} ({self.with_image / count:.0%})"
        if self.first_images:
            kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(self.first_images).most_common())
            yield f"first {_plural(len(self.first_images), 'image')}: {kinds}"
        if self.lengths:
            yield f"{'characters':<12}{'min':>8}{'median':>8}{'max':>8}"
        for name, values in self.lengths.items():
            yield f"  {name:<10}{min(values):>8,}{median_low(values):>8,}{max(values):>8,}"


def _texts(sample: Sample) -> list[tuple[str, str]]:
    if isinstance(sample, Pair):
        return [("question", sample.question), ("chosen", sample.chosen), ("rejected", sample.rejected)]
    return [(turn.role, turn.text) for turn in sample.turns]


def _row(reader: ShardReader, position: int) -> Iterator[str]:
    try:
        sample = reader.read(position)
    except BadSample as error:
        yield f"  {error}"
        return
    yield f"  {sample.key}  {_image_kind(sample.image) if sample.image is not None else 'text only'}"
    for name, text in _texts(sample):
        line = text.replace("\n", "\\n")
        yield f"    {name}: {line if len(line) <= _WIDTH else line[: _WIDTH - 3] + '...'}"


def _image_kind(encoded: bytes) -> str:
    """Such as `JPEG 640x480`. Reads the header alone: nothing is decoded, and no other program is started on it."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return f"{image.format} {image.width}x{image.height}"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return "unreadable"


def _plural(count: int, name: str) -> str:
    return f"{count:,} {name}{'' if count == 1 else 's'}"
