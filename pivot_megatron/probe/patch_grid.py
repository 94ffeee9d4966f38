"""Where an encoder's patches lie on an image, and how much of each a box covers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pivot_megatron.data.views import ImageViews

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Box:
    """In pixels of the image as it is stored, from its top left corner; `right` and `bottom` are the first past it."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class PatchGrid:
    """Patches from the image's top left corner on, each `height` x `width` of its pixels, which need not be whole numbers."""

    rows: int
    columns: int
    height: float
    width: float

    @classmethod
    def on(cls, views: ImageViews, patch_size: int, width: int, height: int) -> PatchGrid:
        """Of an image of so many pixels, which is seen as one sequence of patches. What is left of it past the last whole patch
        no patch sees."""
        ((rows, columns),) = views.view(width, height).grids
        ((down, across),) = views.sizes(width, height)
        return cls(rows, columns, patch_size * height / down, patch_size * width / across)

    def cover(self, box: Box) -> Values:
        """`[rows, columns]`: the share of each patch's area that lies in the box."""
        down = _overlaps(self.rows, self.height, box.top, box.bottom)
        return np.outer(down, _overlaps(self.columns, self.width, box.left, box.right))


def _overlaps(count: int, size: float, low: float, high: float) -> Values:
    """`[count]`: the share of each of `count` neighbouring spans of `size`, from 0 on, that lies between `low` and `high`."""
    edges = size * np.arange(count + 1)
    return np.asarray(np.clip(np.minimum(edges[1:], high) - np.maximum(edges[:-1], low), 0.0, None) / size)
