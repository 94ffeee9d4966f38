"""From the gradient at an image's tokens to a map over its patches, and how much of the map falls on a region.

Source of the map: "RL makes MLLMs see better than SFT" (arXiv 2510.16333). `cover` `[rows, columns]` is the share of each patch
that lies in the region, as PatchGrid has it, above 0 somewhere.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pivot_megatron.probe.patch_grid import Values

SMALLEST = 3
"""Rows and columns of a grid whose border has inner neighbours."""


def saliency_map(gradient: Tensor, rows: int, columns: int) -> Values:
    """`[rows * columns, width]`, a loss's gradient with regard to the tokens of an image's patches, row by row, to
    `[rows, columns]` from 0 to 1: its L1 norm over channels, the border replaced, min-max. Raises ValueError where that is the
    same everywhere, or not finite."""
    norms = gradient.detach().cpu().double().abs().sum(dim=1).numpy()
    return min_max(inner_border(norms.reshape(rows, columns)))


def inner_border(values: Values) -> Values:
    """`[rows, columns]`, the outermost patches replaced by their inner neighbours, a corner by the one that is diagonal to it."""
    if min(values.shape) < SMALLEST:
        raise ValueError(f"expected {SMALLEST} x {SMALLEST} patches or more, got {values.shape[0]} x {values.shape[1]}")
    return np.pad(values[1:-1, 1:-1], 1, mode="edge")


def min_max(values: Values) -> Values:
    """Moved and scaled to reach from 0 to 1."""
    low, high = values.min(), values.max()
    if not (np.isfinite(values).all() and low < high):
        raise ValueError(f"expected finite values that differ, got {low} to {high}")
    return np.asarray((values - low) / (high - low))


def energy_inside(saliency: Values, cover: Values) -> float:
    """The share of the whole map that lies in the region; of an even map, `cover`'s mean.

    Source: Wang et al., "Score-CAM" (arXiv 1910.01279), the energy-based pointing game.
    """
    return float((saliency * cover).sum() / saliency.sum())


def points_inside(saliency: Values, cover: Values) -> bool:
    """Whether the map's maximum is in the region: at a patch of which the region covers at least half as much as of the one it
    covers most, since a map says nothing finer than a patch. A maximum that the border was replaced by stands there too.

    Source: Zhang et al., "Top-down Neural Attention by Excitation Backprop" (arXiv 1608.00507), the pointing game.
    """
    return bool(_inside(cover)[saliency == saliency.max()].any())


def pointing_chance(cover: Values) -> float:
    """How often `points_inside` says so of a map whose maximum is at any inner patch alike."""
    rows, columns = cover.shape[0] - 2, cover.shape[1] - 2
    patches = np.pad(np.arange(rows * columns).reshape(rows, columns), 1, mode="edge")
    return float(len(np.unique(patches[_inside(cover)])) / (rows * columns))


def _inside(cover: Values) -> npt.NDArray[np.bool_]:
    return np.asarray(cover >= cover.max() / 2)
