"""How images are seen, against transformers' own processors: sizes of every kind, pixels bit for bit."""

from __future__ import annotations

import io
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaOnevisionProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import (
    Siglip2ImageProcessorPil,
    get_image_size_for_max_num_patches,
)

from pivot_megatron.config.schema import AnyRes
from pivot_megatron.data.images import Backend, ImageTransform, PixelSteps, decode_rgb, image_size_of
from pivot_megatron.data.sample import BadSample
from pivot_megatron.data.shard_writer import ShardWriter
from pivot_megatron.data.shards import open_shards
from pivot_megatron.data.views import Native, Square, Tiled, Tiling, native_grid, pixels_of

MEAN, STD = (0.5, 0.4, 0.3), (0.1, 0.2, 0.3)
STEPS = {"resample": 3, "rescale_factor": 1 / 255}
TILE = 32
SIZES = [
    (32, 32),
    (64, 64),
    (31, 33),
    (100, 20),
    (20, 100),
    (97, 64),
    (1, 1),
    (640, 480),
    (150, 149),
    (33, 500),
    (7, 3),
]


def noise(width: int, height: int) -> bytes:
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def tiled(most_tiles: int = 3, patch: int = 8) -> Tiled:
    grids = AnyRes().every_grid[:18]  # up to three rows of up to six tiles
    return Tiled(ImageTransform(**STEPS, mean=MEAN, std=STD, image_size=TILE), TILE // patch, grids, most_tiles)


def their_tiles(views: Tiled) -> LlavaOnevisionImageProcessorPil:
    return LlavaOnevisionImageProcessorPil(
        size={"height": TILE, "width": TILE},
        image_grid_pinpoints=[[rows * TILE, columns * TILE] for rows, columns in views.grids],
        image_mean=list(MEAN),
        image_std=list(STD),
        resample=3,
    )


@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_bit_equal_to_transformers(size: tuple[int, int]) -> None:
    views, data = tiled(), noise(*size)
    theirs = their_tiles(views)(Image.open(io.BytesIO(data)), return_tensors="pt")["pixel_values"][0]
    ours = pixels_of(views, data, "pil")
    assert ours.shape == theirs.shape == (len(views.view(*size).grids), 3, TILE, TILE)
    assert torch.equal(ours, theirs.float())


@pytest.mark.parametrize("most_tiles", [1, 3, 9])
def test_an_image_takes_as_many_tokens_as_in_transformers(most_tiles: int) -> None:
    views = tiled(most_tiles)
    processor = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
    processor.num_image_tokens, processor.vision_aspect_ratio = views.patches**2, f"anyres_max_{most_tiles}"
    processor.image_processor = their_tiles(views)
    draw, scaled = random.Random(most_tiles), 0
    for width, height in [*SIZES, *((draw.randint(1, 400), draw.randint(1, 400)) for _ in range(300))]:
        if max(width, height) > 30 * min(width, height):
            continue  # transformers finds no grid where the short side vanishes
        view = views.view(width, height)
        assert view.tokens == processor._get_number_of_features(height, width, TILE, TILE), (width, height)
        scaled += view.tiling is not None and view.tiling.scaled is not None
    assert scaled or most_tiles == 9


def test_native_sizes_are_those_of_transformers() -> None:
    draw = random.Random(0)
    for width, height in [*SIZES, *((draw.randint(1, 3000), draw.randint(1, 3000)) for _ in range(200))]:
        for most in (1, 24, 256, 1024):
            their_height, their_width = get_image_size_for_max_num_patches(height, width, 16, most)
            assert native_grid(width, height, 16, most) == (their_height // 16, their_width // 16)


@pytest.mark.parametrize("size", SIZES)
def test_native_patches_are_bit_equal_to_transformers(size: tuple[int, int]) -> None:
    views = Native(PixelSteps(**STEPS, mean=MEAN, std=STD), patch_size=8, most_patches=40)
    options = {"patch_size": 8, "max_num_patches": 40, "resample": 3, "image_mean": MEAN, "image_std": STD}
    data = noise(*size)
    theirs = Siglip2ImageProcessorPil(**options)(Image.open(io.BytesIO(data)), return_tensors="pt")
    view = views.view(*size)
    assert view.grids == (tuple(theirs["spatial_shapes"][0].tolist()),)
    valid = theirs["pixel_attention_mask"][0].bool()
    assert torch.equal(pixels_of(views, data, "pil"), theirs["pixel_values"][0][valid].float())


def test_torch_resizes_tiles_and_patches_as_nearly() -> None:
    plain = {**STEPS, "mean": None, "std": None}
    for views in (
        Tiled(ImageTransform(**plain, image_size=TILE), 4, ((2, 3),), 9),
        Native(PixelSteps(**plain), patch_size=8, most_patches=40),
    ):
        difference = pixels_of(views, noise(150, 149), "torch") - pixels_of(views, noise(150, 149), "pil")
        assert float(difference.abs().max()) <= 2 / 255 + 1e-6


def in_one_go(views: Square | Tiled | Native, data: bytes, backend: Backend) -> torch.Tensor:
    """Each resize where its pixels are needed."""
    image = decode_rgb(data)
    if isinstance(views, Square):
        return views.transform(data, backend)[None]
    if isinstance(views, Native):
        edge = views.patch_size
        rows, columns = native_grid(image.width, image.height, edge, views.most_patches)
        pixels = views.steps.normalised(views.steps.resized(image, rows * edge, columns * edge, backend))
        return pixels.unfold(1, edge, edge).unfold(2, edge, edge).permute(1, 2, 3, 4, 0).reshape(rows * columns, -1)
    transform, size = views.transform, views.transform.image_size
    rows, columns = (views.view(*image.size).tiling or Tiling((0, 0), 0, 0, 0, 0)).tiles
    scale = min(columns * size / image.width, rows * size / image.height)
    height, width = (
        min(math.ceil(side * scale), most * size) for side, most in ((image.height, rows), (image.width, columns))
    )
    canvas = np.zeros((rows * size, columns * size, 3), np.uint8)
    top, left = (rows * size - height) // 2, (columns * size - width) // 2
    canvas[top : top + height, left : left + width] = transform.resized(image, height, width, backend)
    squares = [transform(data, backend)]
    for row in range(rows):
        for column in range(columns):
            tile = canvas[row * size : (row + 1) * size, column * size : (column + 1) * size]
            squares.append(transform.normalised(tile))
    return torch.stack(squares)


@pytest.mark.parametrize("backend", ["pil", "torch"])
@pytest.mark.parametrize("size", SIZES)
def test_resized_apart_and_put_together_it_is_the_same(size: tuple[int, int], backend: Backend) -> None:
    square = ImageTransform(**STEPS, mean=MEAN, std=STD, image_size=TILE)
    for views in (Square(square, 4), tiled(), Native(square, patch_size=8, most_patches=40)):
        found = pixels_of(views, noise(*size), backend)
        assert found.dtype == torch.float32 and torch.equal(found, in_one_go(views, noise(*size), backend))


def test_fingerprints_tell_settings_apart() -> None:
    square = ImageTransform(**STEPS, mean=MEAN, std=STD, image_size=TILE)
    every = [Square(square, 4), tiled(3), tiled(4), *(Native(square, 8, most) for most in (40, 41))]
    assert len({views.fingerprint for views in every}) == len(every)
    assert tiled(3).fingerprint == tiled(3).fingerprint


def test_sizes_are_read_from_the_heads_of_files(tmp_path: Path) -> None:
    record = {"question": "q", "chosen": "a", "rejected": "b"}
    with ShardWriter(tmp_path, samples_per_shard=10) as writer:
        writer.write("text", None, None, record)
        writer.write("one", noise(40, 30), "png", record)
        writer.write("two", noise(5, 7), "png", record, rejected_image=noise(9, 8))
        writer.write("cut", noise(50, 60)[:120], "png", record)
        writer.write("broken", b"no image", "png", record)
    reader = open_shards(tmp_path)
    assert [reader.image_sizes(i) for i in range(4)] == [[], [(40, 30)], [(5, 7), (9, 8)], [(50, 60)]]
    with pytest.raises(BadSample, match="bad_image"):
        reader.image_sizes(4)
    jpeg = io.BytesIO()
    Image.open(io.BytesIO(noise(300, 200))).save(jpeg, "JPEG")
    assert image_size_of(jpeg) == (300, 200)
