"""Samples of a folder of shards on one page: their images, what is asked, both answers and where they differ; and the facts."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import jinja2
from PIL import Image

from pivot_megatron.data.differences import Piece, clipped, compared
from pivot_megatron.data.histogram import Measure, edge_label, value_label
from pivot_megatron.data.images import ImageError, decode_rgb
from pivot_megatron.data.inspect import Facts, image_head, images_of, texts_of
from pivot_megatron.data.sample import BadSample, Pair, Sample
from pivot_megatron.data.shards import ShardReader
from pivot_megatron.errors import UserError

_PIXELS = 480
_SHOWN = 360
"""Characters shown of a text."""
_TURNS = 6


@dataclass(frozen=True)
class Picture:
    """`uri`: the image as a data URI, empty where `detail` says why it does not decode. `caption` is empty for an only image."""

    caption: str
    head: str
    uri: str
    detail: str = ""


@dataclass(frozen=True)
class Text:
    """A field of a sample and what is shown of it, which is `length` characters long in full."""

    name: str
    pieces: Sequence[Piece]
    length: int


@dataclass(frozen=True)
class Card:
    """One sample as it is shown; `broken` is (reason, detail) of one that cannot be read. `left_out`: turns not shown."""

    key: str
    pictures: Sequence[Picture] = ()
    texts: Sequence[Text] = ()
    left_out: int = 0
    broken: tuple[str, str] | None = None


@dataclass(frozen=True)
class Plot:
    """A histogram: `bars` are (height in percent of the highest, what it counts), `ticks` (place in percent, label)."""

    name: str
    unit: str
    summary: str
    bars: Sequence[tuple[float, str]]
    ticks: Sequence[tuple[float, str]]


def require_sheet(path: Path) -> None:
    """Raises UserError for a file that no sheet can be written to."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--sheet: expected a name that ends in .html, found {path}")
    if not path.parent.is_dir():
        raise UserError(f"--sheet: expected a folder at {path.parent}, found none: make it first")
    if path.is_dir():
        raise UserError(f"--sheet: expected a file at {path}, found a folder")


def write_sheet(path: Path, facts: Facts, reader: ShardReader, positions: Sequence[int]) -> None:
    """Write the samples at `positions` and the facts as one page: no scripts, no other files, nothing fetched.

    Images are decoded as training decodes them and shown small; texts are cut. A file that is there is written over.
    """
    source = files("pivot_megatron.data").joinpath("contact_sheet.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(source).render(
        facts=facts,
        cards=[read_card(reader, position) for position in positions],
        plots=[plot_of(found) for found in facts.measures],
    )
    # A key is a file's name, which need not have been UTF-8.
    path.write_bytes(page.encode("utf-8", errors="backslashreplace"))


def read_card(reader: ShardReader, position: int) -> Card:
    try:
        sample = reader.read(position)
    except BadSample as error:
        return Card(error.key, broken=(error.reason, clipped(error.detail, _SHOWN)))
    texts = _texts(sample)
    return Card(sample.key, _pictures(sample), texts[:_TURNS], len(texts) - len(texts[:_TURNS]))


def plot_of(found: Measure) -> Plot:
    highest = max(found.counts)
    width = 100 / len(found.counts)
    every = 1 + (len(found.edges) - 1) // 9
    return Plot(
        name=found.name,
        unit=found.unit,
        summary=f"{value_label(found.least)} to {value_label(found.most)}, median {value_label(found.median)}",
        bars=[
            (100 * count / highest, f"{label}: {count:,}")
            for label, count in zip(found.labels, found.counts, strict=True)
        ],
        ticks=[(i * width, edge_label(edge)) for i, edge in enumerate(found.edges) if i % every == 0],
    )


def _texts(sample: Sample) -> list[Text]:
    shown: dict[str, Sequence[Piece]] = {}
    if isinstance(sample, Pair):
        shown["chosen"], shown["rejected"] = compared(sample.chosen, sample.rejected, _SHOWN)
    return [
        Text(name, shown.get(name) or (Piece(clipped(text, _SHOWN)),), len(text)) for name, text in texts_of(sample)
    ]


def _pictures(sample: Sample) -> list[Picture]:
    images = images_of(sample)
    captions = ("chosen", "rejected") if len(images) > 1 else ("",)
    return [_picture(caption, image) for caption, image in zip(captions, images, strict=False)]


def _picture(caption: str, encoded: bytes) -> Picture:
    head = image_head(encoded)
    try:
        uri = _thumbnail(decode_rgb(encoded))
    except ImageError as error:
        return Picture(caption, str(head or "unreadable"), "", clipped(error.detail, _SHOWN))
    return Picture(caption, str(head), uri)


def _thumbnail(image: Image.Image) -> str:
    """A data URI. What is small enough stays as it is, to the pixel."""
    small = max(image.size) <= _PIXELS // 4
    image.thumbnail((_PIXELS, _PIXELS))
    file = io.BytesIO()
    if small:
        image.save(file, "PNG")
    else:
        image.save(file, "JPEG", quality=85)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"
