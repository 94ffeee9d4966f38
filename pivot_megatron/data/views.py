"""How an encoder and a language model see an image: one square, a square and tiles of it, or patches at its own aspect ratio."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pivot_megatron.data.images import Backend, ImageTransform, PixelSteps, decode_rgb

Grid = tuple[int, int]
"""Rows and columns; of pixels, height and width."""
Resized = npt.NDArray[np.uint8]
"""An image in bytes, `[height, width, 3]`."""


@dataclass(frozen=True)
class Tiling:
    """How features of tiles become what the language model sees of them: laid out on `tiles`, cut to `[top : top + height,
    left : left + width]` patches, which leaves out the black bars, and scaled to `scaled`, where they are too many."""

    tiles: Grid
    top: int
    left: int
    height: int
    width: int
    scaled: Grid | None = None

    @property
    def lines(self) -> Grid:
        """Rows of tokens, and tokens in each."""
        return self.scaled or (self.height, self.width)


@dataclass(frozen=True)
class View:
    """`tokens`: places that the image takes in the language model's sequence. `grids`: patches down and across of each of the
    encoder's sequences that show it. `tiling`: None where its tokens are the encoder's patches as they stand."""

    tokens: int
    grids: tuple[Grid, ...]
    tiling: Tiling | None = None

    @classmethod
    def of_patches(cls, rows: int, columns: int) -> View:
        """One sequence of the encoder's, whose patches the language model sees as they are."""
        return cls(rows * columns, ((rows, columns),))


class ImageViews(Protocol):
    @property
    def fixed(self) -> View | None:
        """What every image's view is; None where it depends on the image's size."""
        ...

    @property
    def fingerprint(self) -> str:
        """A stable name (hex): equal settings, equal string, on every machine."""
        ...

    def view(self, width: int, height: int) -> View:
        """Of an image of so many pixels."""
        ...

    @property
    def steps(self) -> PixelSteps:
        """What resizes and normalises."""
        ...

    def sizes(self, width: int, height: int) -> tuple[Grid, ...]:
        """Height and width of each resize of an image of so many pixels."""
        ...

    def assembled(self, width: int, height: int, resized: Sequence[Resized]) -> Tensor:
        """What the encoder is given of an image of so many pixels, resized to each of its `sizes`; float32: squares
        `[n, 3, S, S]`, one for each of its view's grids, or patches `[n, 3 * patch * patch]`."""
        ...


def pixels_of(views: ImageViews, encoded: bytes, backend: Backend) -> Tensor:
    """What the encoder is given of one image, as `assembled` says. Raises ImageError."""
    image = decode_rgb(encoded)
    resized = [views.steps.resized(image, *size, backend) for size in views.sizes(*image.size)]
    return views.assembled(*image.size, resized)


@dataclass(frozen=True)
class Square:
    """The whole image in one square of `patches` patches a side."""

    transform: ImageTransform
    patches: int

    @property
    def fixed(self) -> View:
        return View.of_patches(self.patches, self.patches)

    @property
    def fingerprint(self) -> str:
        return self.transform.fingerprint

    def view(self, width: int, height: int) -> View:
        return self.fixed

    @property
    def steps(self) -> PixelSteps:
        return self.transform

    def sizes(self, width: int, height: int) -> tuple[Grid, ...]:
        return ((self.transform.image_size, self.transform.image_size),)

    def assembled(self, width: int, height: int, resized: Sequence[Resized]) -> Tensor:
        (square,) = resized
        return self.transform.normalised(square)[None]


@dataclass(frozen=True)
class Tiled:
    """LLaVA-OneVision's AnyRes: the whole image in one square, then the image laid on the grid of squares that suits it best.

    `grids`: those it may be laid on, the first of equals winning. `most_tiles`: what takes more tokens than so many squares, by
    a tenth of a side, is scaled down to them. Equal to transformers' `LlavaOnevisionImageProcessor` and the merging in its model.
    """

    transform: ImageTransform
    patches: int
    grids: tuple[Grid, ...]
    most_tiles: int

    fixed: None = None

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.transform.fingerprint} {self.grids} {self.most_tiles}".encode()).hexdigest()

    def view(self, width: int, height: int) -> View:
        tiling = self._tiling(width, height)
        rows, columns = tiling.lines
        squares = 1 + math.prod(tiling.tiles)
        return View(self.patches**2 + rows * (columns + 1), ((self.patches, self.patches),) * squares, tiling)

    @property
    def steps(self) -> PixelSteps:
        return self.transform

    def sizes(self, width: int, height: int) -> tuple[Grid, ...]:
        """The whole image in one square, and fitted into its grid of them."""
        rows, columns = self._best_grid(width, height)
        size = self.transform.image_size
        return (size, size), _fitted(width, height, columns * size, rows * size)

    def assembled(self, width: int, height: int, resized: Sequence[Resized]) -> Tensor:
        rows, columns = self._best_grid(width, height)
        size = self.transform.image_size
        square, fitted = resized
        down, across = fitted.shape[:2]
        canvas = np.zeros((rows * size, columns * size, 3), np.uint8)
        top, left = (rows * size - down) // 2, (columns * size - across) // 2
        canvas[top : top + down, left : left + across] = fitted
        tiles = canvas.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
        return torch.stack([self.transform.normalised(square) for square in (square, *tiles)])

    def _best_grid(self, width: int, height: int) -> Grid:
        """On which most of the image's pixels can be shown, and of those the one with least left over."""
        size = self.transform.image_size

        def shown(grid: Grid) -> tuple[int, int]:
            rows, columns = grid
            scale = min(columns * size / width, rows * size / height)
            pixels = min(int(width * scale) * int(height * scale), width * height)
            return pixels, pixels - rows * columns * size * size

        return max(self.grids, key=shown)

    def _tiling(self, width: int, height: int) -> Tiling:
        tiles = rows, columns = self._best_grid(width, height)
        down, across = rows * self.patches, columns * self.patches
        top = left = 0
        # In the floating-point steps of transformers, whose processor and model must agree on these numbers.
        if width / height > across / down:
            top = (down - int(round(height * (across / width), 7))) // 2
        else:
            left = (across - int(round(width * (down / height), 7))) // 2
        down, across = down - 2 * top, across - 2 * left
        ratio = math.sqrt(down * across / (self.most_tiles * self.patches**2))
        scaled = (int(down // ratio), int(across // ratio)) if ratio > 1.1 else None
        return Tiling(tiles, top, left, down, across, scaled)


@dataclass(frozen=True)
class Native:
    """SigLIP2 NaFlex: the image at about its own aspect ratio, in as many whole patches as `most_patches` allow.

    Equal to transformers' `Siglip2ImageProcessor`, without its padding.
    """

    steps: PixelSteps
    patch_size: int
    most_patches: int

    fixed: None = None

    @property
    def fingerprint(self) -> str:
        told = f"{self.steps.fingerprint} {self.patch_size} {self.most_patches}"
        return hashlib.sha256(told.encode()).hexdigest()

    def view(self, width: int, height: int) -> View:
        return View.of_patches(*native_grid(width, height, self.patch_size, self.most_patches))

    def sizes(self, width: int, height: int) -> tuple[Grid, ...]:
        rows, columns = native_grid(width, height, self.patch_size, self.most_patches)
        return ((rows * self.patch_size, columns * self.patch_size),)

    def assembled(self, width: int, height: int, resized: Sequence[Resized]) -> Tensor:
        (whole,) = resized
        edge = self.patch_size
        rows, columns = whole.shape[0] // edge, whole.shape[1] // edge
        pixels = self.steps.normalised(whole)
        return pixels.reshape(3, rows, edge, columns, edge).permute(1, 3, 2, 4, 0).reshape(rows * columns, -1)


@lru_cache(maxsize=4096)
def native_grid(width: int, height: int, patch_size: int, most_patches: int) -> Grid:
    """Patches down and across: each side scaled alike and rounded up to whole patches, by the largest scale that keeps to
    `most_patches`, found by halving the interval from 1e-6 to 100 until it is narrower than 1e-5, as transformers does."""

    def grid(scale: float) -> Grid:
        rows, columns = (max(1, math.ceil(side * scale / patch_size)) for side in (height, width))
        return rows, columns

    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        scale = (low + high) / 2
        low, high = (scale, high) if math.prod(grid(scale)) <= most_patches else (low, scale)
    return grid(low)


def _fitted(width: int, height: int, most_width: int, most_height: int) -> Grid:
    """Height and width of an image scaled to touch the sides that it is fitted into."""
    by_width, by_height = most_width / width, most_height / height
    if by_width < by_height:
        return min(math.ceil(height * by_width), most_height), most_width
    return most_height, min(math.ceil(width * by_height), most_width)
