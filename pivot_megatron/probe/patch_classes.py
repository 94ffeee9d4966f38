"""Which classes each patch of an encoder shows, by the mask of its image."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from pivot_megatron.data.views import Grid

Mask = npt.NDArray[np.uint16]


def patch_classes(mask: Mask, resized: Grid, patch: int, classes: int) -> npt.NDArray[np.bool_]:
    """`[rows, columns, classes]`: whether a pixel of that class lies in that patch, at least in part.

    `mask` `[height, width]` of the image as it is stored, values below `classes`. `resized`: to how many pixels down and across
    the image is brought before it is cut into patches of `patch` pixels a side, from its top left corner on; what is past the
    last whole patch is in none. Pixels are counted where they are stored, for which the mask needs no resizing.
    """
    (height, width), (down, across) = mask.shape, resized
    rows, columns = (list(_spans(*sides, patch)) for sides in ((height, down), (width, across)))
    found = np.zeros((len(rows), len(columns), classes), np.bool_)
    for i, row in enumerate(rows):
        stripe = mask[row]
        for j, column in enumerate(columns):
            found[i, j, stripe[:, column].ravel()] = True
    return found


def _spans(stored: int, resized: int, patch: int) -> Iterator[slice]:
    """Of each whole patch along a side, the stored pixels that it covers."""
    for n in range(resized // patch):
        yield slice(n * patch * stored // resized, -(-(n + 1) * patch * stored // resized))
