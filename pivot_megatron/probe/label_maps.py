"""Images with their masks and what heads make of their patches, side by side in one picture."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from pivot_megatron.data.images import decode_mask, decode_rgb

_HEIGHT, _WIDEST, _GAP, _TITLE = 160, 280, 6, 16
_WHITE = (255, 255, 255)


@dataclass(frozen=True)
class LabelMap:
    """`labels` `[rows, columns]`: a class for each patch. `covered`: as PatchSet has it."""

    labels: npt.NDArray[np.intp]
    covered: tuple[float, float]


def class_colors(classes: int) -> npt.NDArray[np.uint8]:
    """`[classes, 3]`: black for class 0, and for the others hues a golden section of the circle apart."""
    hues = [(n * 0.6180339887498949) % 1.0 for n in range(classes)]
    colors = [colorsys.hsv_to_rgb(hue, (0.9, 0.6, 0.75)[n % 3], (0.95, 0.8, 0.6)[n % 3]) for n, hue in enumerate(hues)]
    found = np.round(255 * np.array(colors)).astype(np.uint8)
    found[0] = 0
    return found


def side_by_side(
    images: Sequence[tuple[bytes, bytes]], maps: Sequence[Sequence[LabelMap]], titles: Sequence[str], classes: int
) -> Image.Image:
    """A row an (encoded image, encoded mask); columns: the image, its mask, and for each of `titles` its map of that row."""
    colors = class_colors(classes)
    rows = []
    for n, (encoded, encoded_mask) in enumerate(images):
        image = decode_rgb(encoded)
        size = _shown(image.width, image.height)
        mask = Image.fromarray(colors[decode_mask(encoded_mask)]).resize(size, Image.Resampling.NEAREST)
        rows.append([image.resize(size), mask, *(_drawn(some[n], colors, size) for some in maps)])
    return _laid_out(rows, ["image", "mask", *titles])


def _shown(width: int, height: int) -> tuple[int, int]:
    scale = min(_HEIGHT / height, _WIDEST / width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _drawn(found: LabelMap, colors: npt.NDArray[np.uint8], size: tuple[int, int]) -> Image.Image:
    whole = Image.new("RGB", size, _WHITE)
    down, across = found.covered
    part = max(1, round(size[0] * across)), max(1, round(size[1] * down))
    whole.paste(Image.fromarray(colors[found.labels]).resize(part, Image.Resampling.NEAREST))
    return whole


def _laid_out(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str]) -> Image.Image:
    width = max(cell.width for row in rows for cell in row) + _GAP
    heights = [max(cell.height for cell in row) + _GAP for row in rows]
    sheet = Image.new("RGB", (_GAP + width * len(titles), _TITLE + _GAP + sum(heights)), _WHITE)
    draw = ImageDraw.Draw(sheet)
    for n, title in enumerate(titles):
        while title and draw.textlength(title) > width - _GAP:
            title = title[1:]
        draw.text((_GAP + n * width, 3), title, fill=(0, 0, 0))
    top = _TITLE + _GAP
    for row, height in zip(rows, heights, strict=True):
        for n, cell in enumerate(row):
            sheet.paste(cell, (_GAP + n * width, top))
        top += height
    return sheet
