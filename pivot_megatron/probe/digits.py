"""scikit-learn's handwritten digits as images: a set that is there on every machine."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from pivot_megatron.probe.image_set import ImageSet

_TEST_SHARE = 0.3


def digits(image_size: int) -> tuple[ImageSet, ImageSet]:
    """1797 digits of 8x8, ten classes, as RGB PNGs of `image_size` pixels a side: 1257 to train and 540 to test, stratified and
    always the same."""
    found = load_digits()
    images = [_digit_png(digit, image_size) for digit in found.images]
    labels, classes = found.target.astype(np.int64), [str(name) for name in found.target_names]
    shares = train_test_split(np.arange(len(images)), test_size=_TEST_SHARE, stratify=labels, random_state=0)
    train, test = (ImageSet.of_bytes([images[n] for n in share], labels[share], classes) for share in shares)
    return train, test


def _digit_png(digit: npt.NDArray[np.float64], image_size: int) -> bytes:
    """One `[8, 8]` digit with values 0..16 as a PNG."""
    pixels = np.round(digit * (255 / 16)).astype(np.uint8)
    image = Image.fromarray(pixels).resize((image_size, image_size), Image.Resampling.BICUBIC).convert("RGB")
    png = io.BytesIO()
    image.save(png, format="PNG")
    return png.getvalue()
