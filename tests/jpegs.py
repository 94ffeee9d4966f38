"""JPEGs that look like photographs, text and gradients, and ways to break them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

SIZES = [(640, 480), (320, 500), (97, 64), (50, 60), (33, 210), (16, 16), (7, 3), (1, 1), (1, 90), (200, 2)]


def photo(width: int, height: int) -> Image.Image:
    """Soft shapes under a little noise."""
    rng = np.random.default_rng(width * 1000 + height)
    shapes = rng.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(shapes).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((pixels + rng.integers(-8, 9, pixels.shape)).clip(0, 255).astype(np.uint8))


def text(width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (width, height), "white")
    for y in range(0, height, 13):
        ImageDraw.Draw(image).text((2, y), "the quick brown fox 0123 " * 8, fill=(200 * (y % 2), 0, 0))
    return image


def gradient(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(
        np.stack([255 * x / width, 255 * y / height, 128 + 120 * np.sin(x / 9)], -1).astype(np.uint8)
    )


def jpeg(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def plain() -> dict[str, bytes]:
    """JPEGs of usual make."""
    exif = Image.Exif()
    exif[0x0112] = 6
    found = {f"{kind.__name__} {size}": jpeg(kind(*size)) for kind in (photo, text, gradient) for size in SIZES}
    for subsampling in (0, 1, 2):
        for quality in (30, 95):
            found[f"4:{subsampling}, {quality}"] = jpeg(photo(150, 101), subsampling=subsampling, quality=quality)
    return found | {
        "progressive": jpeg(photo(120, 90), progressive=True),
        "restarts": jpeg(photo(120, 90), restart_marker_rows=1),
        "grey": jpeg(photo(120, 90).convert("L")),
        "rgb": jpeg(photo(120, 90), keep_rgb=True),
        "turned": jpeg(photo(120, 90), exif=exif),
        "profile": jpeg(photo(120, 90), icc_profile=b"profile" * 20_000, comment=b"\xff\xd9"),
        "large": jpeg(photo(1600, 1200)),
    }


def unusual() -> dict[str, bytes]:
    """Sound images of every other kind."""

    def encoded(image: Image.Image, form: str) -> bytes:
        file = io.BytesIO()
        image.save(file, form)
        return file.getvalue()

    rgb = photo(60, 50)
    alpha = rgb.copy()
    alpha.putalpha(rgb.convert("L"))
    return {
        "cmyk": jpeg(rgb.convert("CMYK")),
        "png": encoded(rgb, "PNG"),
        "alpha": encoded(alpha, "PNG"),
        "palette": encoded(rgb.convert("P"), "PNG"),
        "sixteen bits": encoded(Image.fromarray(np.arange(3000, dtype=np.uint16).reshape(50, 60) * 20), "PNG"),
        "webp": encoded(rgb, "WEBP"),
        "gif": encoded(rgb, "GIF"),
        "bmp": encoded(rgb, "BMP"),
        "tiff": encoded(rgb, "TIFF"),
        "behind the end": jpeg(rgb) + b"\xff\xda and more",
        "an end in the middle": jpeg(rgb)[:900] + b"\xff\xd9",
    }


def broken(each: int, seed: int = 0) -> Iterator[bytes]:
    """Cut, flipped, filled and spliced, some so little that they still decode."""
    rng = np.random.default_rng(seed)
    yield from (b"", b"\xff\xd8", b"\xff\xd8\xff\xd9", b"\xff\xd8\xff no image", b"not an image")
    sound = plain()
    for name in ("photo (97, 64)", "4:0, 95", "progressive", "restarts", "grey", "rgb", "turned"):
        whole = sound[name]
        yield from (whole[:-1], whole[:-2], whole[: len(whole) // 2], b"xyz" + whole)
        head = whole.index(b"\xff\xda")
        for _ in range(each):
            for low, high in ((2, head), (head, len(whole))):
                at = int(rng.integers(low, high))
                yield whole[:at] + bytes([whole[at] ^ 1 << int(rng.integers(8))]) + whole[at + 1 :]
            at = int(rng.integers(2, len(whole) - 20))
            yield whole[:at]
            yield whole[:at] + whole[at + int(rng.integers(1, 15)) :]
            yield whole[:at] + rng.bytes(12) + whole[at + 12 :]
            yield whole[:at] + bytes([0xFF, rng.integers(256)]) + whole[at + 2 :]
            yield whole[:at] + bytes([0xFF, 0xDA]) + whole[at + 2 :]
