"""Pixels against the Hugging Face processor itself."""

import io
import json
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from pivot_megatron.data import images as images_module
from pivot_megatron.data.images import ImageError, ImageTransform, decode_rgb, square_processor
from pivot_megatron.errors import UserError

SIGLIP = {
    "do_resize": True,
    "size": {"height": 48, "width": 48},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_convert_rgb": True,
    "image_processor_type": "SiglipImageProcessor",
}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def folder(path: Path, **change: Any) -> Path:
    (path / "preprocessor_config.json").write_text(json.dumps({**SIGLIP, **change}))
    return path


def noise(height: int, width: int, channels: int = 3) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Smooth noise and a hard edge: what photographs and rendered text do to a resampler."""
    rng = np.random.default_rng(height * 1000 + width)
    pixels = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    pixels[: height // 2, : width // 2] = 255
    pixels[height // 2 :, width // 2 :] //= 8
    return pixels


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def images() -> dict[str, bytes]:
    rgb = Image.fromarray(noise(37, 91))
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save(turned, "JPEG", exif=exif)
    return {
        "jpeg": encoded(rgb, "JPEG"),
        "webp": encoded(rgb, "WEBP"),
        "large": encoded(Image.fromarray(noise(300, 211))),
        "same size": encoded(Image.fromarray(noise(48, 48))),
        "tall": encoded(Image.fromarray(noise(150, 70))),
        "wide": encoded(Image.fromarray(noise(70, 150))),
        "just tall": encoded(Image.fromarray(noise(73, 60))),
        "not quite": encoded(Image.fromarray(noise(72, 60))),
        "tall and narrow": encoded(Image.fromarray(noise(49, 20))),
        "small": encoded(Image.fromarray(noise(40, 20))),
        "one pixel": encoded(Image.fromarray(noise(1, 1))),
        "rgba": encoded(Image.fromarray(noise(60, 50, 4))),
        "gray": encoded(rgb.convert("L")),
        "gray alpha": encoded(rgb.convert("LA")),
        "palette": encoded(rgb.convert("P")),
        "one bit": encoded(rgb.convert("1")),
        "cmyk": encoded(rgb.convert("CMYK"), "JPEG"),
        "exif": turned.getvalue(),
    }


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"resample": 2},
        IMAGENET,
        {"do_normalize": False},
        {"do_rescale": False},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0], "image_std": [1.0, 1.0, 1.0]},
    ],
)
def test_pil_is_bit_equal_to_transformers(tmp_path: Path, change: dict[str, Any]) -> None:
    transform = ImageTransform.from_processor_folder(folder(tmp_path, **change))
    processor = SiglipImageProcessorPil.from_pretrained(tmp_path)
    for name, data in images().items():
        expected = processor(images=Image.open(io.BytesIO(data)), return_tensors="pt")["pixel_values"][0]
        pixels = transform(data, "pil")
        assert (pixels.shape, pixels.dtype) == ((3, 48, 48), torch.float32)
        assert torch.equal(pixels, expected.to(torch.float32)), name


@pytest.mark.parametrize("resample", [2, 3])
def test_torch_is_within_two_levels_of_pil(tmp_path: Path, resample: int) -> None:
    transform = ImageTransform.from_processor_folder(folder(tmp_path, resample=resample, do_normalize=False))
    for name, data in images().items():
        torch_pixels = transform(data, "torch")
        assert (torch_pixels.shape, torch_pixels.dtype) == ((3, 48, 48), torch.float32)
        difference = (torch_pixels - transform(data, "pil")).abs().max().item()
        assert difference <= 2 / 255 + 1e-6, (name, difference * 255)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_floats_resize_within_two_levels_of_bytes(mode: str) -> None:
    """What a GPU does, done here: rounded between the passes, in their order."""
    for height, width in ((37, 91), (300, 211), (150, 70), (70, 150), (73, 60), (72, 60), (49, 20), (1, 9)):
        pixels = torch.from_numpy(noise(height, width))
        exact, rounded = (
            images_module._torch_resize(pixels, 48, 64, interpolated, mode).astype(int)
            for interpolated in (images_module._interpolated_bytes, images_module._interpolated_floats)
        )
        assert abs(exact - rounded).max() <= 2, (height, width)


def test_what_is_no_image_is_told_alike_in_every_process() -> None:
    with pytest.raises(ImageError) as caught:
        decode_rgb(b"no image")
    assert caught.value.detail == "expected JPEG, PNG, WEBP, GIF, BMP, TIFF, found something else"


def test_broken_bytes() -> None:
    transform = ImageTransform(3, 1 / 255, None, None, 48)
    good = encoded(Image.fromarray(noise(64, 64)), "JPEG")
    not_listed = encoded(Image.fromarray(noise(64, 64)), "PPM")
    for bad in (b"", b"not an image", good[: len(good) // 2], not_listed):
        with pytest.raises(ImageError) as caught:
            transform(bad)
        assert pickle.loads(pickle.dumps(caught.value)).detail == caught.value.detail != ""


@pytest.mark.parametrize("edge", [10_000, 60_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb_is_refused_before_decoding(edge: int) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", edge, edge, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(ImageError, match="pixels"):
        ImageTransform(3, 1 / 255, None, None, 48)(bomb)


def test_a_square_cut_from_the_middle_becomes_a_resize_to_it(tmp_path: Path) -> None:
    """CLIP's and DINOv2's processors, of which the recipe takes the whole image; timm says the same in other words."""
    config = {
        "do_center_crop": True,
        "size": {"shortest_edge": 64},
        "crop_size": {"height": 48, "width": 48},
        "resample": 3,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.1, 0.2, 0.3],
    }
    cut, square, timm = (tmp_path / name for name in ("cut", "square", "timm"))
    for folder in (cut, square, timm):
        folder.mkdir()
    (cut / "preprocessor_config.json").write_text(json.dumps(config))
    (square / "preprocessor_config.json").write_text(json.dumps(square_processor(config, 48)))
    said = {"input_size": [3, 48, 48], "interpolation": "bicubic", "mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3]}
    (timm / "config.json").write_text(json.dumps({"pretrained_cfg": said}))
    found = [ImageTransform.from_processor_folder(folder) for folder in (cut, square, timm)]
    assert found[0] == found[1] == found[2] == ImageTransform(3, 1 / 255, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3), 48)
    assert ImageTransform.from_processor_folder(cut, 32).image_size == 32


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"do_center_crop": True}, "crop_size"),
        ({"do_pad": True}, "do_pad"),
        ({"do_resize": False}, "do_resize"),
        ({"size": {"height": 48, "width": 64}}, "only a square"),
        ({"size": {"shortest_edge": 48}}, "only a square"),
        ({"size": 48}, "only a square"),
        ({"resample": 1}, "resample"),
        ({"resample": None}, "resample"),
        ({"image_mean": None}, "image_mean"),
        ({"image_std": [0.5]}, "image_std"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std"),
        ({"rescale_factor": "x"}, "rescale_factor"),
    ],
)
def test_processors_that_do_something_else(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        ImageTransform.from_processor_folder(folder(tmp_path, **change))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_old_vit_size_is_a_square(tmp_path: Path) -> None:
    path = folder(tmp_path, size=32, image_processor_type="ViTImageProcessor")
    assert ImageTransform.from_processor_folder(path).image_size == 32


def test_missing_and_unreadable_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found none"):
        ImageTransform.from_processor_folder(tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "preprocessor_config.json").write_text(text)
        with pytest.raises(UserError, match="fetch the file again"):
            ImageTransform.from_processor_folder(tmp_path)


def test_fingerprint_names_the_settings(tmp_path: Path) -> None:
    base = ImageTransform.from_processor_folder(folder(tmp_path))
    again = ImageTransform.from_processor_folder(folder(tmp_path, processor_class="AnyProcessor"))
    again(encoded(Image.fromarray(noise(9, 9))))
    assert base.fingerprint == again.fingerprint
    other: list[dict[str, Any]] = [
        {"resample": 2},
        {"size": {"height": 64, "width": 64}},
        IMAGENET,
        {"do_rescale": False},
    ]
    names = {ImageTransform.from_processor_folder(folder(tmp_path, **change)).fingerprint for change in other}
    assert len(names | {base.fingerprint}) == 5
