"""An image file as training should find it: kept byte for byte where training sees it right, made plain where not."""

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from pivot_megatron.data.images import IMAGE_FORMATS, ImageError, decode_rgb

# What EXIF's orientation (2 to 8) asks a viewer to do.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
# Of files that had to be changed though nobody asked for smaller ones: an eye sees no difference.
_QUALITY = 95
_DEEP_GRAY = ("I", "F")


class PictureError(Exception):
    """An image that cannot be used. Attributes: `reason`, a snake_case category; `detail`, one line for a person."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Reencoding:
    """JPEG at `quality` (1 to 95) for every image, the longer side at most `longest_side` pixels."""

    quality: int
    longest_side: int | None = None


@dataclass(frozen=True)
class Traits:
    """Of a file, from its head. `changes`: why it cannot be kept byte for byte, empty where it can."""

    format: str
    orientation: int
    changes: tuple[str, ...]


def read_picture(image: Path | bytes) -> bytes:
    """The encoded file. Raises PictureError `image_not_found`, `image_unreadable` or `image_empty`."""
    if isinstance(image, Path):
        try:
            data = image.read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise PictureError("image_not_found", f"expected an image at {image}, found none") from error
        except (OSError, ValueError) as error:
            raise PictureError("image_unreadable", f"{image}: {error}") from error
    else:
        data = image
    if not data:
        raise PictureError("image_empty", "expected an image, found zero bytes")
    return data


def examine(data: bytes) -> Traits:
    """Decode an image as training will, and say what must change. Raises PictureError `image_broken` or `image_too_large`."""
    traits = _traits(data)
    try:
        decode_rgb(data)
    except ImageError as error:
        raise PictureError("image_broken", error.detail) from error
    return traits


def as_written(data: bytes, reencoding: Reencoding | None) -> tuple[bytes, str]:
    """The bytes a shard gets and their extension. Raises PictureError as `examine` does."""
    traits = _traits(data)
    if reencoding is None and not traits.changes:
        return data, _EXTENSIONS[traits.format]
    image = _plain(data, traits)
    if reencoding is not None:
        side = reencoding.longest_side
        if side is not None and max(image.size) > side:
            scale = side / max(image.size)
            image = image.resize([max(1, round(edge * scale)) for edge in image.size], Image.Resampling.LANCZOS)
        return _encoded(image, "JPEG", quality=reencoding.quality), "jpg"
    if _EXTENSIONS.get(traits.format) == "jpg":
        return _encoded(image, "JPEG", quality=_QUALITY, subsampling=0), "jpg"
    return _encoded(image, "PNG"), "png"


def _traits(data: bytes) -> Traits:
    try:
        with warnings.catch_warnings():
            # Between its limit and twice that Pillow warns; here both are refused, as training does.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        with image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                raise PictureError("image_too_large", f"{image.width}x{image.height} pixels, more than {limit}")
            # Before the orientation: Pillow reads a PNG to its end for that, and forgets how it was stored.
            deep = image.mode[:1] in _DEEP_GRAY or any(";16" in str(tile[3]) for tile in image.tile)
            orientation = _orientation(image)
            found = {
                "exif_orientation": orientation != 1,
                "cmyk": image.mode == "CMYK",
                "16_bit": deep,
                "palette": image.mode in ("P", "PA"),
                # The second picture of an MPO is a camera's preview; every reader of JPEG sees the first.
                "animated": image.format != "MPO" and getattr(image, "n_frames", 1) > 1,
                "other_format": image.format not in _EXTENSIONS,
            }
            return Traits(str(image.format), orientation, tuple(name for name, holds in found.items() if holds))
    except Image.DecompressionBombError as error:
        raise PictureError("image_too_large", str(error)) from error
    except UnidentifiedImageError as error:
        raise PictureError("image_broken", f"expected {', '.join(IMAGE_FORMATS)}, found something else") from error
    except PictureError:
        raise
    except Exception as error:
        # Pillow's readers answer broken bytes with anything from OSError to SyntaxError and struct.error.
        raise PictureError("image_broken", f"{type(error).__name__}: {error}") from error


def _orientation(image: Image.Image) -> int:
    """1 where there is none, or none that can be read: the image itself is sound then."""
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:
        return 1
    return found if found in _TURNS else 1


def _plain(data: bytes, traits: Traits) -> Image.Image:
    """The first frame, RGB, upright."""
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            # Pillow's own conversion clips 16 bits to 8, and white is what remains.
            rgb = _deep_gray(image) if image.mode[:1] in _DEEP_GRAY else decode_rgb(data)
    except ImageError as error:
        raise PictureError("image_broken", error.detail) from error
    return rgb.transpose(_TURNS[traits.orientation]) if traits.orientation != 1 else rgb


def _deep_gray(image: Image.Image) -> Image.Image:
    """White is the depth's largest level; of a mode without a depth of its own, that of the least depth that holds it."""
    levels = np.asarray(image, dtype=np.float64)
    highest = 65535.0 if image.mode.startswith("I;16") else float(levels.max())
    white = next((float(limit) for limit in (255, 65535) if highest <= limit), highest)
    return Image.fromarray(np.rint(levels.clip(0) / white * 255).astype(np.uint8)).convert("RGB")


def _encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
