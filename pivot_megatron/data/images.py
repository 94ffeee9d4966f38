"""From an encoded image to the pixels an encoder sees: decoded, resized, rescaled and normalised.

The settings come from the encoder's own `preprocessor_config.json`, so that pixels agree with Hugging Face's processor.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import PIL
import torch
from PIL import Image, UnidentifiedImageError

from pivot_megatron.errors import UserError

Backend = Literal["pil", "torch"]

# The formats data sets hold. Pillow knows many more, some of which start other programs on bytes nobody has vetted.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# A side of no real image (it is JPEG's largest); what resizes takes gigabytes for a line of millions of pixels.
_LONGEST_SIDE = 65535
_PILLOW_MAJOR = int(PIL.__version__.partition(".")[0])
_MODES: Mapping[int, str] = {2: "bilinear", 3: "bicubic"}
# torch's CUDA kernel holds a whole filter in shared memory, which is full where a side shrinks by some eighty times.
_MOST_SHRINKING_ON_CUDA = 32
_MASK_MODES = ("1", "L", "P", "I", "I;16")
_STEPS_NOT_DONE = ("do_pad", "do_thumbnail", "do_align_long_axis", "do_image_splitting")


class ImageError(Exception):
    """Bytes that do not decode to an image. The caller knows the sample's key and adds it. Attribute: `detail`."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


@dataclass(frozen=True)
class PixelSteps:
    """Resize, rescale and normalise, for images of any size and mode.

    `resample` is Pillow's number of the filter (2 bilinear, 3 bicubic). `rescale_factor`, `mean` and `std` are None
    where the processor leaves that step out.
    """

    resample: int
    rescale_factor: float | None
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None

    @classmethod
    def from_config(cls, path: Path, config: Mapping[str, Any]) -> "PixelSteps":
        """From `preprocessor_config.json`; `path` names it in errors."""
        return cls(**_steps(path, config))

    def resized(self, image: Image.Image, height: int, width: int, backend: Backend) -> npt.NDArray[np.uint8]:
        """`[height, width, 3]`.

        `pil` is bit for bit what the PIL-based Hugging Face processor gives. `torch` resizes with torch's antialiased
        kernel: faster on some machines, and at most a level or two out of 255 away.
        """
        if backend == "torch":
            return self.resized_by_torch(torch.from_numpy(np.array(image)), height, width)
        return np.asarray(image.resize((width, height), resample=Image.Resampling(self.resample)))

    def resized_by_torch(self, pixels: torch.Tensor, height: int, width: int) -> npt.NDArray[np.uint8]:
        """`[h, w, 3]` uint8 on any device → `[height, width, 3]` in the machine's memory.

        On a CPU what `resized` gives with `torch`; elsewhere in float32, rounded between the passes, a level or two away.
        """
        h, w, _ = pixels.shape
        # torch's float kernels are wrong where one pixel's width stays one.
        if pixels.device.type == "cpu" or w == 1 or max(h / height, w / width) > _MOST_SHRINKING_ON_CUDA:
            return _torch_resize(pixels.cpu(), height, width, _interpolated_bytes, _MODES[self.resample])
        return _torch_resize(pixels, height, width, _interpolated_floats, _MODES[self.resample])

    def normalised(self, pixels: npt.NDArray[np.uint8]) -> torch.Tensor:
        """`[height, width, 3]` bytes to `[3, height, width]` float32, in the order red, green, blue."""
        levels = self._levels
        return torch.from_numpy(np.stack([levels[channel][pixels[:, :, channel]] for channel in range(3)]))

    @property
    def fingerprint(self) -> str:
        """A stable name of these settings (hex): equal settings, equal string, on every machine."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @cached_property
    def _levels(self) -> npt.NDArray[np.float32]:
        """`[3, 256]` float32: what each byte of each channel becomes.

        After the resize every step depends on one byte alone, so a table is exact, and cheaper than the arithmetic on
        every pixel. The dtypes follow transformers' `rescale` (in float64, then cast) and `normalize` (in float32).
        """
        levels = np.tile(np.arange(256, dtype=np.uint8), (3, 1))
        values = levels.astype(np.float32)
        if self.rescale_factor is not None:
            values = (levels.astype(np.float64) * self.rescale_factor).astype(np.float32)
        if self.mean is not None and self.std is not None:
            values = (values - np.array(self.mean, np.float32)[:, None]) / np.array(self.std, np.float32)[:, None]
        return values


@dataclass(frozen=True)
class ImageTransform(PixelSteps):
    """The steps of an encoder that sees one square of `image_size` pixels a side."""

    image_size: int

    @classmethod
    def from_processor_folder(cls, folder: str | Path, image_size: int | None = None) -> "ImageTransform":
        """Read the processor of a Hugging Face folder.

        A processor that cuts a square from the middle is taken to resize to that square: nothing of an image is cut away
        (the recipe has one square tile for every encoder). `image_size`: of a run at another resolution than the processor's.
        Raises UserError for a missing or unreadable file, and for a processor that does anything but these steps.
        """
        path, config = read_processor(Path(folder))
        return cls(**_steps(path, config), image_size=image_size or _square_size(path, config))

    def __call__(self, encoded: bytes, backend: Backend = "pil") -> torch.Tensor:
        """Pixels of one image: `[3, image_size, image_size]` float32. EXIF orientation is not applied, as Hugging Face's
        processor does not apply it. Raises ImageError."""
        return self.normalised(self.resized(decode_rgb(encoded), self.image_size, self.image_size, backend))


_Interpolate = Callable[[torch.Tensor, tuple[int, int], str], torch.Tensor]
"""`[1, 3, h, w]` uint8 to another height and width by the filter of that name, antialiased and clipped to bytes."""


def _interpolated_bytes(batch: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    return torch.nn.functional.interpolate(batch, size, mode=mode, antialias=True)


def _interpolated_floats(batch: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    resized = torch.nn.functional.interpolate(batch.float(), size, mode=mode, antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def _torch_resize(
    pixels: torch.Tensor, to_height: int, to_width: int, interpolated: _Interpolate, mode: str
) -> npt.NDArray[np.uint8]:
    """`[height, width, 3]` → `[to_height, to_width, 3]`, the passes in Pillow's order.

    Both libraries clip to bytes between the two passes, so the order shows at sharp edges (by up to 20 levels). torch
    goes along the rows first. So did Pillow before version 13, which goes along the columns first where the height
    shrinks by more than twice as many pixels as the width.
    """
    height, width, _ = pixels.shape
    # [1, 3, height, width], left channels-last in memory, which torch's uint8 kernel likes.
    batch = pixels.permute(2, 0, 1)[None]
    if _PILLOW_MAJOR >= 13 and height - to_height > 2 * max(width - to_width, 0):
        batch = interpolated(batch, (to_height, width), mode)
    elif interpolated is _interpolated_floats:
        batch = interpolated(batch, (height, to_width), mode)
    batch = interpolated(batch, (to_height, to_width), mode)
    resized: npt.NDArray[np.uint8] = batch[0].permute(1, 2, 0).cpu().numpy()
    return resized


def image_size_of(file: BinaryIO) -> tuple[int, int]:
    """Width and height in pixels, from the head of an encoded image alone. Raises ImageError."""
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            _require_bounded(image)
            return image.size
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(_reason(error)) from error


def _require_bounded(image: Image.Image) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    # Pillow itself only warns until twice its limit; one such image can stall a whole step on every rank.
    if limit is not None and image.width * image.height > limit:
        raise ImageError(f"{image.width}x{image.height} pixels, more than the {limit} that are decoded")
    if max(image.size) > _LONGEST_SIDE:
        raise ImageError(f"{image.width}x{image.height} pixels, more than {_LONGEST_SIDE} a side")


def decode_rgb(encoded: bytes) -> Image.Image:
    """Decode to an RGB image, transparency laid on white as transformers does. Raises ImageError."""
    with _decoded(encoded) as image:
        if image.mode.startswith("I;16"):  # what Pillow makes of 16 bits is white
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            rgba = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
        return image.convert("RGB")


def decode_mask(encoded: bytes) -> npt.NDArray[np.uint16]:
    """A PNG of one channel, as it stands: `[height, width]`, grey levels or indices into its palette. Raises ImageError."""
    with _decoded(encoded) as image:
        if image.format != "PNG" or image.mode not in _MASK_MODES:
            raise ImageError(f"expected a PNG of one channel, found {image.format} of mode {image.mode}")
        return np.asarray(image).astype(np.uint16)


@contextmanager
def _decoded(encoded: bytes) -> Iterator[Image.Image]:
    """The image as it is stored. What the body raises is an ImageError too."""
    try:
        with Image.open(io.BytesIO(encoded), formats=IMAGE_FORMATS) as image:
            _require_bounded(image)
            if image.format == "PNG":
                _require_checksums(encoded)
            image.load()
            yield image
    except ImageError:
        raise
    except Exception as error:
        # Pillow's decoders answer broken bytes with anything from OSError to SyntaxError and struct.error.
        raise ImageError(_reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its own words name an object in memory, another in each process
        return f"expected {', '.join(IMAGE_FORMATS)}, found something else"
    return f"{type(error).__name__}: {error}"


def _require_checksums(png: bytes) -> None:
    """Pillow decodes a PNG whose data are not what their checksums say. Raises what Pillow does."""
    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        image.verify()


def read_processor(folder: Path) -> tuple[Path, dict[str, Any]]:
    """`preprocessor_config.json` of a Hugging Face folder, or the `pretrained_cfg` of timm's `config.json` in its words."""
    path = folder / "preprocessor_config.json"
    return path, _read_config(path) if path.is_file() else _timm_processor(folder) or _read_config(path)


def _steps(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of PixelSteps."""
    _refuse_other_steps(path, config)
    normalize = config.get("do_normalize", True)
    return {
        "resample": _resample(path, config),
        "rescale_factor": _rescale_factor(path, config) if config.get("do_rescale", True) else None,
        "mean": _triple(path, config, "image_mean") if normalize else None,
        "std": _std(path, config) if normalize else None,
    }


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"expected an image processor at {path}, found none: give the encoder's Hugging Face folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"expected JSON in {path}, found something else ({error}): fetch the file again") from error
    if not isinstance(config, dict):
        raise UserError(f"expected an object in {path}, found {type(config).__name__}: fetch the file again")
    return config


def _timm_processor(folder: Path) -> dict[str, Any] | None:
    """timm's `pretrained_cfg` in the words of a Hugging Face processor; None where the folder is not timm's."""
    path = folder / "config.json"
    cfg = _read_config(path).get("pretrained_cfg") if path.is_file() else None
    if not isinstance(cfg, dict):
        return None
    height, width = cfg.get("input_size", (3, None, None))[1:]
    return {
        "size": {"height": height, "width": width},
        "resample": {"bilinear": 2, "bicubic": 3}.get(str(cfg.get("interpolation")), cfg.get("interpolation")),
        "image_mean": cfg.get("mean"),
        "image_std": cfg.get("std"),
    }


def square_processor(config: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """`preprocessor_config.json` of a processor that resizes to a square as training did, and cuts nothing away."""
    square = {"height": image_size, "width": image_size}
    found = {**config, "do_resize": True, "size": square}
    if "do_center_crop" in found or "crop_size" in found:
        found |= {"do_center_crop": False, "crop_size": square}
    return found


def _refuse_other_steps(path: Path, config: Mapping[str, Any]) -> None:
    for name in _STEPS_NOT_DONE:
        if config.get(name):
            raise UserError(
                f"expected a plain square resize in {path}, found {name}: true: set it to false, or use "
                f"an encoder without that step"
            )
    if not config.get("do_resize", True):
        raise UserError(f"expected a square resize in {path}, found do_resize: false: set it to true")


def _square_size(path: Path, config: Mapping[str, Any]) -> int:
    key = "crop_size" if config.get("do_center_crop") else "size"
    size = config.get(key)
    # Old ViT processors wrote a bare number for a square; in CLIP's and SigLIP's it means the shortest edge.
    if isinstance(size, int) and (config.get("do_center_crop") or str(_processor_type(config)).startswith("ViT")):
        size = {"height": size, "width": size}
    if isinstance(size, dict) and set(size) == {"height", "width"} and size["height"] == size["width"]:
        edge = size["height"]
        if isinstance(edge, int) and edge > 0:
            return edge
    raise UserError(
        f'expected "{key}": {{"height": S, "width": S}} in {path}, found {size!r}: only a square resize is supported'
    )


def _processor_type(config: Mapping[str, Any]) -> Any:
    return config.get("image_processor_type", config.get("feature_extractor_type"))


def _resample(path: Path, config: Mapping[str, Any]) -> int:
    resample = config.get("resample")
    if not isinstance(resample, int) or resample not in _MODES:
        raise UserError(f"expected resample 2 (bilinear) or 3 (bicubic) in {path}, found {resample!r}")
    return resample


def _rescale_factor(path: Path, config: Mapping[str, Any]) -> float:
    factor = config.get("rescale_factor", 1 / 255)
    if not isinstance(factor, int | float) or isinstance(factor, bool):
        raise UserError(f"expected a number in rescale_factor of {path}, found {factor!r}")
    return float(factor)


def _triple(path: Path, config: Mapping[str, Any], name: str) -> tuple[float, float, float]:
    values = config.get(name)
    if isinstance(values, list) and len(values) == 3 and all(isinstance(value, int | float) for value in values):
        return (float(values[0]), float(values[1]), float(values[2]))
    raise UserError(f"expected three numbers in {name} of {path}, found {values!r}")


def _std(path: Path, config: Mapping[str, Any]) -> tuple[float, float, float]:
    std = _triple(path, config, "image_std")
    if min(std) <= 0:
        raise UserError(f"expected numbers above zero in image_std of {path}, found {list(std)}")
    return std
