"""Which classes each patch shows, against brute force and the pixels that every family's encoder is given."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pivot_megatron.convert.tiny_checkpoints import make_encoder
from pivot_megatron.data.views import pixels_of
from pivot_megatron.errors import UserError
from pivot_megatron.probe import features as feature_files
from pivot_megatron.probe import patch_files
from pivot_megatron.probe.masked import MaskedImages
from pivot_megatron.probe.opening import opened
from pivot_megatron.probe.patch_classes import patch_classes
from pivot_megatron.probe.patch_files import image_sizes, patch_sets
from tests.masked import COLORS, corners, pairs, png, write_folder
from tests.parity.encoders import MAKERS, make


def uneven(folder: Path) -> Path:
    """SigLIP of 46 pixels in patches of 8: the last 6 pixels of each side are in none."""
    make_encoder(folder, image_size=40, patch_size=8, hidden_size=32, layers=2, heads=2, ffn=48, seed=0)
    for name, keys in (("config.json", ("image_size",)), ("preprocessor_config.json", ("height", "width"))):
        text = (folder / name).read_text()
        for key in keys:
            text = text.replace(f'"{key}": 40', f'"{key}": 46')
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("stored", "resized", "patch"),
    [((12, 20), (8, 8), 4), ((37, 53), (30, 30), 8), ((5, 3), (16, 24), 4), ((8, 8), (8, 8), 1)],
)
def test_patches_have_the_classes_of_their_pixels(
    stored: tuple[int, int], resized: tuple[int, int], patch: int
) -> None:
    """Brute force: each stored pixel is a square that overlaps a patch's, in exact fractions of the side."""
    mask = np.random.default_rng(0).integers(0, 7, stored).astype(np.uint16)
    found = patch_classes(mask, resized, patch, 9)
    assert found.shape == (resized[0] // patch, resized[1] // patch, 9)

    def overlap(pixel: int, of: int, part: int, side: int) -> bool:
        low, high = Fraction(part * patch, side), Fraction((part + 1) * patch, side)
        return Fraction(pixel, of) < high and Fraction(pixel + 1, of) > low

    for i, j in np.ndindex(found.shape[:2]):
        rows = [y for y in range(stored[0]) if overlap(y, stored[0], i, resized[0])]
        columns = [x for x in range(stored[1]) if overlap(x, stored[1], j, resized[1])]
        assert set(np.flatnonzero(found[i, j])) == set(mask[np.ix_(rows, columns)].ravel().tolist())


@pytest.mark.parametrize("size", [(53, 37), (40, 120), (17, 16)])
@pytest.mark.parametrize("family", [*MAKERS, "uneven"])
def test_a_patch_that_shows_one_class_has_its_color(family: str, size: tuple[int, int], tmp_path: Path) -> None:
    """Corners do not meet in the middle, so that an image cut, turned or shifted before it is seen would show."""
    mask = corners(*size, 0.4, 0.65)
    with opened(made(family, tmp_path / family)) as encoder:
        views, patch = encoder.views, encoder.arch.patch_size
        (grid,), (resized,) = views.view(*size).grids, views.sizes(*size)
        pixels = pixels_of(views, png(COLORS[mask]), "pil")
        found = patch_classes(mask.astype(np.uint16), resized, patch, 4)
        expected = torch.stack([views.steps.normalised(color[None, None])[:, 0, 0] for color in COLORS])
    assert found.shape[:2] == grid
    seen = means_of_patches(pixels, patch, grid)
    distances = torch.cdist(seen, expected)
    pure = torch.from_numpy(found.reshape(-1, 4)).sum(dim=1) == 1
    classes = torch.from_numpy(found.reshape(-1, 4)).int().argmax(dim=1)
    assert set(classes[pure].tolist()) == {0, 1, 2, 3}
    assert torch.equal(distances.argmin(dim=1)[pure], classes[pure])
    assert float(distances.min(dim=1).values[pure].max()) < 0.25  # what a filter brings over from beyond the patch


def made(family: str, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return uneven(folder) if family == "uneven" else make(family, folder)


def means_of_patches(pixels: torch.Tensor, patch: int, grid: tuple[int, int]) -> torch.Tensor:
    """`[patches, 3]`, of what an encoder is given of one image."""
    if pixels.ndim == 2:
        return pixels.reshape(len(pixels), -1, 3).mean(dim=1)
    rows, columns = grid
    cut = pixels[0, :, : rows * patch, : columns * patch].reshape(3, rows, patch, columns, patch)
    return cut.mean(dim=(2, 4)).permute(1, 2, 0).reshape(-1, 3)


@pytest.mark.parametrize(("family", "covered"), [("siglip2", 1.0), ("uneven", 40 / 46)])
def test_sets_hold_features_and_classes_of_every_image(
    family: str, covered: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In files of three images; of SigLIP2, whose patches are more for one image than for another, and where some pixels are in
    none."""
    monkeypatch.setattr("pivot_megatron.probe.patch_set.IMAGES_A_FILE", 3)
    monkeypatch.setattr(patch_files, "IMAGES_A_FILE", 3)
    monkeypatch.setattr(feature_files, "_SECONDS_BETWEEN_WORDS", -1.0)
    some = pairs(8, seed=4)
    images = MaskedImages.opened(write_folder(tmp_path, "train", some))
    told: list[str] = []
    with opened(made(family, tmp_path / "encoder")) as encoder:
        (found,) = patch_sets(encoder, [("train", images)], 9, 2, tmp_path / "cache", told.append)
        (again,) = patch_sets(encoder, [("train", images)], 9, 2, tmp_path / "cache", told.append)
        (in_memory,) = patch_sets(encoder, [("train", images)], 9, 5)
        expected = encoder.patches([(name, images.read(n)) for n, name in enumerate(images.names)])
        views, patch = encoder.views, encoder.arch.patch_size
    assert len(found) == 8 and len(found.features) == 3 and found.present.tolist() == [0, 1, 2, 3]
    assert (len({len(one) for one in expected}) > 1) == (family == "siglip2")
    assert set(found.covered) == {(covered, covered)}
    assert all(isinstance(one, np.memmap) for one in (*found.features, *again.targets))
    assert sum("of 8 images" in one for one in told) == 5  # two of each file of three; the second time there are none
    size = sum(one.nbytes for one in found.features) / 2**30
    assert [one for one in told if "GiB" in one] == [f"features of patches take {size:.2f} GiB in {tmp_path / 'cache'}"]
    for order in ([5, 0, 7], [3], range(8)):
        features, there = found.of(list(order))
        torch.testing.assert_close(
            features, torch.cat([expected[n] for n in order]).half().float(), rtol=2e-3, atol=2e-3
        )
        masks = [np.asarray(Image.open(io.BytesIO(some[n][1]))).astype(np.uint16) for n in order]
        by_hand = [patch_classes(mask, views.sizes(*mask.shape[::-1])[0], patch, 9).reshape(-1, 9) for mask in masks]
        assert torch.equal(there, torch.from_numpy(np.concatenate(by_hand)))
        for other in (again, in_memory):
            torch.testing.assert_close(other.of(list(order))[0], features, rtol=2e-3, atol=2e-3)
            assert torch.equal(other.of(list(order))[1], there)


def test_a_disk_without_room_and_features_too_large_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = MaskedImages.opened(write_folder(tmp_path, "train", pairs(2, seed=4)))
    with opened(made("siglip", tmp_path / "encoder")) as encoder:
        large = replace(encoder, projector=lambda patches: patches * 1e9)
        with pytest.raises(UserError, match=r"0000\.png: expected features that float16 holds, found .*e\+"):
            patch_sets(large, [("train", images)], 4)
        monkeypatch.setattr(patch_files.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
        with pytest.raises(UserError, match=r"features of patches take 0\.00 GiB, and 0\.00 are free; set --out"):
            patch_sets(encoder, [("train", images)], 4, cache=tmp_path / "cache")


def broken(tmp_path: Path, change: Callable[[Path], None]) -> MaskedImages:
    write_folder(tmp_path, "train", pairs(3, seed=1))
    change(tmp_path / "annotations" / "train" / "deep" / "0001.png")
    return MaskedImages.opened(tmp_path)


def jpeg(path: Path) -> None:
    Image.open(path).save(path, "JPEG")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda path: path.write_bytes(png(corners(9, 8, 0.5, 0.5))),
            r"0001\.png: expected \d+x\d+ pixels, as .*, found 9x8",
        ),
        (lambda path: path.write_bytes(b"none"), r"0001\.png: not a mask that can be read"),
        (jpeg, r"0001\.png: not a mask that can be read \(expected a PNG of one channel, found JPEG of mode L"),
        (lambda path: Image.open(path).convert("RGB").save(path), r"found PNG of mode RGB"),
        (
            lambda path: path.write_bytes(png(np.asarray(Image.open(path)) + np.uint8(2))),
            r"0001\.png: expected classes 0 to 3, found 5; set --classes",
        ),
    ],
)
def test_a_mask_that_is_none_is_named_before_any_image_is_encoded(
    change: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    images = broken(tmp_path, change)
    with opened(made("siglip", tmp_path / "encoder")) as encoder, pytest.raises(UserError, match=message):
        patch_sets(replace(encoder, model=None), [("train", images)], 4)  # what would fail otherwise if it were called


def test_sizes_are_of_width_and_height(tmp_path: Path) -> None:
    (pair,) = [(png(np.zeros((5, 9, 3), np.uint8)), png(np.zeros((5, 9), np.uint8)))]
    write_folder(tmp_path, "train", [pair])
    assert image_sizes(MaskedImages.opened(tmp_path)).tolist() == [[9, 5]]
