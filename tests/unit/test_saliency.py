"""From gradients to maps and their scores, by hand; and where patches lie on an image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pivot_megatron.data.images import ImageTransform, PixelSteps
from pivot_megatron.data.views import Native, Square
from pivot_megatron.probe.patch_grid import Box, PatchGrid
from pivot_megatron.probe.saliency import (
    energy_inside,
    inner_border,
    min_max,
    pointing_chance,
    points_inside,
    saliency_map,
)


def test_a_border_is_its_inner_neighbours() -> None:
    values = np.arange(20.0).reshape(4, 5)
    expected = [[6, 6, 7, 8, 8], [6, 6, 7, 8, 8], [11, 11, 12, 13, 13], [11, 11, 12, 13, 13]]
    assert inner_border(values).tolist() == expected
    for shape in ((2, 9), (9, 2)):
        with pytest.raises(ValueError, match=f"3 x 3 patches or more, got {shape[0]} x {shape[1]}"):
            inner_border(np.ones(shape))


def test_min_max() -> None:
    assert min_max(np.array([[2.0, 4.0], [3.0, 10.0]])).tolist() == [[0.0, 0.25], [0.125, 1.0]]
    for odd in (np.full((2, 2), 3.0), np.zeros((2, 2)), np.array([[1.0, np.nan]]), np.array([[1.0, np.inf]])):
        with pytest.raises(ValueError, match="finite values that differ"):
            min_max(odd)


def test_a_map_is_the_l1_norm_over_channels_row_by_row() -> None:
    """Of 3 rows of 4: the inner patches are 5 and 6, of norms 3 and 7; signs do not cancel."""
    gradient = torch.zeros(12, 2)
    gradient[5], gradient[6] = torch.tensor([1.0, -2.0]), torch.tensor([-4.0, 3.0])
    gradient[0] = 1e6  # a corner says nothing
    assert saliency_map(gradient, 3, 4).tolist() == [[0.0, 0.0, 1.0, 1.0]] * 3
    gradient = torch.zeros(12, 2)
    gradient[4], gradient[7] = torch.tensor([1.0, 0.0]), torch.tensor([0.0, -5.0])  # one above the other in rows of 3
    assert saliency_map(gradient, 4, 3).tolist() == [[0.0] * 3] * 2 + [[1.0] * 3] * 2


def test_scores_by_hand() -> None:
    saliency = np.array([[0.0, 0.25, 0.0], [0.5, 1.0, 0.25], [0.0, 0.0, 0.0]])
    cover = np.array([[0.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.25, 0.5, 0.0]])
    assert energy_inside(saliency, cover) == pytest.approx(1.25 / 2.0, abs=1e-12)
    assert energy_inside(np.ones((3, 3)), cover) == pytest.approx(cover.mean(), abs=1e-12)
    assert points_inside(saliency, cover)
    saliency[0, 2] = 1.5
    assert not points_inside(saliency, cover)


@pytest.mark.parametrize(("share", "inside"), [(0.49, False), (0.51, True)])
def test_a_patch_is_inside_by_half_of_what_is_covered_most(share: float, inside: bool) -> None:
    saliency, cover = np.zeros((5, 5)), np.zeros((5, 5))
    saliency[2, 2] = 1.0
    cover[1, 1], cover[2, 2] = 0.1, 0.1 * share  # a box that is smaller than a patch
    assert points_inside(saliency, cover) is inside
    assert pointing_chance(cover) == (2 if inside else 1) / 9


def test_chance_is_how_often_a_random_map_points_inside() -> None:
    """Also of a box on the border, where maxima are their inner neighbours'."""
    draw = np.random.default_rng(0)
    for box in (Box(0, 0, 9, 21), Box(31, 12, 50, 33), Box(45, 0, 60, 2)):
        cover = PatchGrid(5, 6, 8.0, 10.0).cover(box)
        hits = [points_inside(min_max(inner_border(draw.random((5, 6)))), cover) for _ in range(4000)]
        assert pointing_chance(cover) == pytest.approx(np.mean(hits), abs=0.03) and 0.0 < np.mean(hits) < 1.0


def test_cover_by_hand() -> None:
    grid = PatchGrid(2, 3, 10.0, 20.0)
    assert grid.cover(Box(10, 5, 40, 10)).tolist() == [[0.25, 0.5, 0.0], [0.0, 0.0, 0.0]]
    assert grid.cover(Box(0, 0, 60, 20)).tolist() == [[1.0] * 3] * 2
    assert grid.cover(Box(61, 0, 70, 20)).tolist() == [[0.0] * 3] * 2


def test_an_energys_chance_is_the_boxs_area() -> None:
    cover = PatchGrid(7, 9, 100 / 7, 200 / 9).cover(Box(13, 7, 150, 81))
    assert cover.mean() == pytest.approx(137 * 74 / (200 * 100), abs=1e-12)


STEPS = {"resample": 2, "rescale_factor": None, "mean": None, "std": None}


def test_squares_squash_and_lose_what_no_patch_sees() -> None:
    """384 pixels of patches of 14 are 27 patches and 6 pixels."""
    found = PatchGrid.on(Square(ImageTransform(**STEPS, image_size=384), 27), 14, width=768, height=192)
    assert (found.rows, found.columns, found.width, found.height) == (27, 27, 28.0, 7.0)
    assert not found.cover(Box(757, 0, 768, 192)).any() and found.cover(Box(750, 0, 768, 192)).any()


def test_native_grids_are_the_whole_image() -> None:
    views = Native(PixelSteps(**STEPS), patch_size=16, most_patches=256)
    found = PatchGrid.on(views, 16, width=640, height=480)
    assert (found.rows, found.columns) == views.view(640, 480).grids[0]
    assert found.rows * found.height == pytest.approx(480) and found.columns * found.width == pytest.approx(640)
    assert found.rows < found.columns
