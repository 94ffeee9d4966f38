"""Position embeddings of encoders that keep an image's aspect ratio."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate


def native_positions(positions: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
    """`[side * side, H]` of a square scaled to images of `grids` (patches down, across), `[n, H]`, image after image.

    Bilinear with antialiasing in float32, as transformers' Siglip2 does it.
    """
    side = math.isqrt(positions.shape[0])
    square = positions.view(side, side, -1).permute(2, 0, 1)[None].float()
    scaled = {
        grid: interpolate(square, grid, mode="bilinear", align_corners=False, antialias=True)[0].flatten(1).T
        for grid in dict.fromkeys(grids)
    }
    return torch.cat([scaled[grid] for grid in grids]).to(positions.dtype)
