"""JPEGs decoded many at a time by NVIDIA DALI, on the GPU where there is one.

DALI decodes and torch resizes, where the decoded image lies: DALI's own resize repeats the pixels at an image's edges instead
of leaving out what lies beyond, which puts the outermost rows up to 25 of 255 levels away from Pillow's and torch's. On a CPU
the pixels are thus bit for bit the torch backend's.

The torch backend takes every image that Pillow may see otherwise than DALI: what is not a JPEG in RGB or grey, of usual make
and whole, and what DALI refuses. So both refuse the same images. It is also what keeps the process alive: DALI 2.4 crashes where
it cannot read the head of one image of several, and EXIF and ICC profiles are cut out, for it reads them too.
"""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from pivot_megatron.data.decoders import Decoded, Decoder, Mapper, OneByOne, mapper
from pivot_megatron.data.images import IMAGE_FORMATS
from pivot_megatron.data.jpeg import plain_jpeg
from pivot_megatron.data.views import ImageViews
from pivot_megatron.errors import UserError
from pivot_megatron.runtime.device import beside_training

MOST_IMAGES = 64  # decoded at once
MOST_PIXELS = 1 << 26  # of those together, unless one alone has more: 200 MB
_INSTALL = "pip install 'pivot-megatron[dali]', or set data.image_backend: torch"


def require_dali() -> None:
    """Raises UserError where it is not installed."""
    try:
        found = importlib.util.find_spec("nvidia.dali")
    except ModuleNotFoundError:  # of `nvidia`
        found = None
    if found is None:
        raise UserError(f"data.image_backend: expected NVIDIA DALI for `dali`, found none: {_INSTALL}")


@contextmanager
def opened(images: ImageViews, workers: int, device: torch.device) -> Iterator[Decoder]:
    """A decoder with `workers` threads of its own and as many of DALI's, which end with the context."""
    with mapper(workers) as mapped:
        yield DaliDecoder(images, mapped, max(1, workers), device)


class DaliDecoder:
    """`threads`: of DALI. `device`: where images are decoded and resized; what comes back is in the machine's memory."""

    def __init__(self, images: ImageViews, mapped: Mapper, threads: int, device: torch.device) -> None:
        self._images = images
        self._mapped = mapped
        self._threads = threads
        self._device = device
        self._others = OneByOne(images, "torch", mapped)
        self._beside_training = beside_training(device)
        self._lock = Lock()
        self._pipeline: Any = None

    def __call__(self, encoded: Sequence[bytes]) -> list[Decoded]:
        found: dict[int, Decoded] = {}
        plain = {n: image for n, one in enumerate(encoded) if (image := Plain.of(one)) is not None}
        for batch in batches({n: image.size for n, image in plain.items()}):
            decoded = zip(batch, self._decoded([plain[n].encoded for n in batch]), strict=True)
            # Tokens are counted by the size that Pillow sees.
            sound = {n: image for n, image in decoded if image is not None and _size(image) == plain[n].size}
            found |= zip(sound, self._mapped(self._pixels, sound.values()), strict=True)
        others = [n for n in range(len(encoded)) if n not in found]
        found |= zip(others, self._others([encoded[n] for n in others]), strict=True)
        return [found[n] for n in range(len(encoded))]

    def _decoded(self, encoded: Sequence[bytes]) -> list[Tensor | None]:
        """Of each image `[height, width, 3]` uint8 on the device; None of one that DALI refuses."""
        with self._lock:
            if self._pipeline is None:
                self._pipeline = _started(self._threads, self._device)
            try:
                return _run(self._pipeline, encoded)
            except RuntimeError:  # says neither of which image, nor of any other; and no pipeline outlives one
                self._pipeline = None
        return [None] if len(encoded) == 1 else [image for one in encoded for image in self._decoded([one])]

    def _pixels(self, image: Tensor) -> Tensor:
        width, height = _size(image)
        steps = self._images.steps
        with self._beside_training():
            resized = [steps.resized_by_torch(image, *size) for size in self._images.sizes(width, height)]
        return self._images.assembled(width, height, resized)


@dataclass(frozen=True)
class Plain:
    """A JPEG that DALI decodes as Pillow does. `size`: width and height; `encoded`: without its metadata."""

    size: tuple[int, int]
    encoded: bytes

    @classmethod
    def of(cls, encoded: bytes) -> Plain | None:
        """None of what is anything else, or may be."""
        try:
            with Image.open(io.BytesIO(encoded), formats=IMAGE_FORMATS) as image:
                kind, mode, size = image.format, image.mode, image.size
        except Exception:  # Pillow's answers to broken bytes are of every kind; the torch backend tells them
            return None
        limit = Image.MAX_IMAGE_PIXELS
        if kind != "JPEG" or mode not in ("RGB", "L") or (limit is not None and math.prod(size) > limit):
            return None
        stream = plain_jpeg(encoded)
        return None if stream is None else cls(size, stream)


def batches(sizes: Mapping[int, tuple[int, int]]) -> Iterator[list[int]]:
    """Places of images by their sizes, cut in order into what is decoded at once."""
    batch: list[int] = []
    pixels = 0
    for place, size in sizes.items():
        pixels += math.prod(size)
        if batch and (len(batch) == MOST_IMAGES or pixels > MOST_PIXELS):
            yield batch
            batch, pixels = [], math.prod(size)
        batch.append(place)
    if batch:
        yield batch


def _size(image: Tensor) -> tuple[int, int]:
    height, width, _ = image.shape
    return width, height


def _started(threads: int, device: torch.device) -> Any:
    """A pipeline from bytes to RGB that has decoded an image. Raises UserError where DALI does not work."""
    try:
        from nvidia.dali import Pipeline, fn, types

        on_gpu = device.type == "cuda"
        pipeline = Pipeline(
            batch_size=MOST_IMAGES,
            num_threads=threads,
            device_id=device.index or 0 if on_gpu else None,
            prefetch_queue_depth=1,  # with which inputs are given to `run`
            exec_dynamic=True,  # with which outputs stay after the next run
        )
        with pipeline:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            decoded = fn.decoders.image(
                encoded,
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,
                # All or nothing by the GPU's JPEG unit: with a share of each batch, an image's pixels would depend on its place.
                hw_decoder_load=1.0,
                affine=False,
            )
            pipeline.set_outputs(decoded)
        pipeline.build()
        _run(pipeline, [_any_jpeg()])
    except (ImportError, OSError, RuntimeError) as error:
        said = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(f"data.image_backend: DALI does not decode here ({said[-1]}): {_INSTALL}") from None
    return pipeline


def _run(pipeline: Any, encoded: Sequence[bytes]) -> list[Tensor | None]:
    (decoded,) = pipeline.run(encoded=[np.frombuffer(image, np.uint8) for image in encoded])
    return [from_dlpack(image) for image in decoded]


def _any_jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    return file.getvalue()
