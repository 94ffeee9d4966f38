"""What becomes of an image file: kept byte for byte, made plain, or refused, each by name."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from pivot_megatron.data.images import decode_rgb
from pivot_megatron.data_prep.pictures import PictureError, Reencoding, as_written, examine, read_picture
from tests.prep import encoded, picture


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=int)


@pytest.mark.parametrize(
    ("data", "extension"),
    [
        (picture(kind="JPEG"), "jpg"),
        (picture(kind="PNG"), "png"),
        (picture(kind="WEBP"), "webp"),
        (picture(kind="JPEG", mode="L"), "jpg"),
        (picture(kind="PNG", mode="RGBA"), "png"),
        (picture(kind="PNG", mode="1"), "png"),
        (picture(kind="MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))]), "jpg"),
    ],
)
def test_sound_files_are_kept_byte_for_byte(data: bytes, extension: str) -> None:
    assert examine(data).changes == ()
    assert as_written(data, None) == (data, extension)


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_orientation_is_applied_once(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = picture(kind=kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))
    assert examine(data).changes == ("exif_orientation",)
    written, extension = as_written(data, None)
    assert extension == {"JPEG": "jpg", "PNG": "png"}[kind]
    right = levels(ImageOps.exif_transpose(opened(data)))
    assert levels(decode_rgb(written)).shape == right.shape
    assert np.abs(levels(decode_rgb(written)) - right).mean() < (3 if kind == "JPEG" else 0.01)
    assert examine(written).changes == ()


@pytest.mark.parametrize("orientation", [1, 0, 9, 77])
def test_an_orientation_that_means_nothing_changes_nothing(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = picture(exif=exif)
    assert as_written(data, None) == (data, "jpg")


def test_cmyk_becomes_rgb() -> None:
    data = picture(kind="JPEG", mode="CMYK", quality=95)
    assert examine(data).changes == ("cmyk",)
    written, extension = as_written(data, None)
    assert (opened(written).mode, extension) == ("RGB", "jpg")
    assert np.abs(levels(decode_rgb(written)) - levels(decode_rgb(picture(kind="PNG")))).mean() < 4


def test_deep_gray_is_scaled_and_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    data = encoded(Image.fromarray(ramp), "PNG")
    assert examine(data).changes == ("16_bit",)
    written, extension = as_written(data, None)
    assert (opened(written).mode, extension) == ("RGB", "png")
    assert np.abs(levels(decode_rgb(written))[:, :, 0] - ramp / 257).max() <= 1
    assert (
        levels(decode_rgb(data)).min() < 255 < np.unique(levels(decode_rgb(data))).size + 254
    )  # what clipping would do


@pytest.mark.parametrize("kind", ["int32", "float32"])
@pytest.mark.parametrize(
    ("highest", "white"), [(100, 255), (255, 255), (256, 65535), (40000, 65535), (65535, 65535), (1_000_000, 1_000_000)]
)
def test_gray_of_no_depth_of_its_own_is_scaled_by_what_it_holds(kind: str, highest: int, white: int) -> None:
    ramp = np.linspace(0, highest, 64).reshape(8, 8).astype(kind)
    data = encoded(Image.fromarray(ramp), "TIFF")
    assert examine(data).changes == ("16_bit", "other_format")
    assert np.abs(levels(decode_rgb(as_written(data, None)[0]))[:, :, 0] - ramp / white * 255).max() <= 1


def test_deep_color_becomes_plain() -> None:
    ramp = np.linspace(0, 65535, 8 * 8 * 3).reshape(8, 8, 3).astype(">u2")
    data = png(8, 8, 16, 2, b"".join(b"\0" + ramp[row].tobytes() for row in range(8)))
    assert examine(data).changes == ("16_bit",)
    written, extension = as_written(data, None)
    assert (examine(written).changes, extension) == ((), "png")
    assert np.abs(levels(decode_rgb(written)) - ramp / 257).max() <= 1


def png(width: int, height: int, depth: int, color: int, raw: bytes) -> bytes:
    import zlib

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def test_palette_becomes_rgb_with_its_transparency_on_white() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([0, 0, 255, 255, 0, 0])
    image.putpixel((0, 0), 1)
    data = encoded(image, "PNG", transparency=0)
    assert examine(data).changes == ("palette",)
    written, extension = as_written(data, None)
    assert (opened(written).mode, extension) == ("RGB", "png")
    assert opened(written).getpixel((0, 0)) == (255, 0, 0)
    assert opened(written).getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_show_their_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "green")]
    data = encoded(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    assert "animated" in examine(data).changes
    written, extension = as_written(data, None)
    assert (extension, getattr(opened(written), "n_frames", 1)) == ("png", 1)
    assert opened(written).getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["BMP", "TIFF"])
def test_formats_that_shards_do_not_take_become_png(kind: str) -> None:
    data = picture(kind=kind)
    assert examine(data).changes == ("other_format",)
    written, extension = as_written(data, None)
    assert extension == "png"
    assert (levels(decode_rgb(written)) == levels(decode_rgb(data))).all()


def test_reencoding() -> None:
    written, extension = as_written(picture(kind="PNG", size=(200, 50)), Reencoding(80, 100))
    assert (extension, opened(written).format, opened(written).size) == ("jpg", "JPEG", (100, 25))
    small = picture(kind="PNG", size=(90, 50))
    assert opened(as_written(small, Reencoding(80, 100))[0]).size == (90, 50)
    assert len(as_written(small, Reencoding(10))[0]) < len(as_written(small, Reencoding(95))[0])


def test_what_cannot_be_used_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(data: Path | bytes) -> str:
        with pytest.raises(PictureError) as caught:
            examine(read_picture(data))
        assert caught.value.detail and "\n" not in caught.value.detail
        return caught.value.reason

    (tmp_path / "zero").write_bytes(b"")
    assert reason(tmp_path / "none") == "image_not_found"
    assert reason(tmp_path / "zero" / "below") == "image_not_found"
    assert reason(tmp_path) == "image_unreadable"
    assert reason(tmp_path / "zero") == reason(b"") == "image_empty"
    assert reason(b"no image at all") == "image_broken"
    whole = picture(kind="JPEG", size=(64, 64))
    assert reason(whole[: len(whole) // 2]) == "image_broken"
    assert reason(picture(kind="PNG", size=(64, 64))[:120]) == "image_broken"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert reason(picture(kind="PNG", size=(11, 10))) == "image_too_large"
    assert reason(picture(kind="PNG", size=(50, 50))) == "image_too_large"
    assert examine(picture(kind="PNG", size=(10, 10))).changes == ()
