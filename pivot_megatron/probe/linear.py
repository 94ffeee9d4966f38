"""Linear probe: how well a logistic regression reads classes from the frozen encoder's mean patch feature."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from transformers import SiglipImageProcessorPil, SiglipVisionModel

from pivot_megatron.errors import UserError
from pivot_megatron.probe.interval import wilson

Features = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

C_GRID = (0.01, 0.03, 0.1, 0.316, 1.0, 3.16)
"""Inverse L2 strengths of the paper's probe (arXiv 2510.16333)."""

_HELD_OUT = 0.2
_DIGITS_TEST = 0.3


@dataclass(frozen=True)
class ProbeResult:
    """One probe. Accuracies are fractions; `low` and `high` are the 95 % Wilson interval of `accuracy`.

    `c` was chosen on a held-out part of the training set. `c_best_on_test` was chosen on the test set itself, as
    the paper does, so `accuracy_best_c_on_test` is optimistic and only there to compare with published numbers.
    """

    accuracy: float
    low: float
    high: float
    correct: int
    total: int
    c: float
    accuracy_best_c_on_test: float
    c_best_on_test: float
    train_total: int


@dataclass(frozen=True)
class LabelledImages:
    """A classification set: encoded images and one class index for each."""

    train_images: tuple[bytes, ...]
    train_labels: Labels
    test_images: tuple[bytes, ...]
    test_labels: Labels


def patch_features(
    encoder_folder: Path, images: Sequence[bytes], *, hidden_state: int, batch_size: int = 64
) -> Features:
    """Mean over patch tokens of one hidden state of a Hugging Face SigLIP encoder, then L2-normalised.

    `hidden_state` indexes `output_hidden_states`, before post-layernorm: 0 is the patch embedding, -1 the last layer's
    output. The layer PIVOT trains is -2 in an original checkpoint and -1 in an export that dropped the last layer.

    Args:
        encoder_folder: holds `config.json`, the weights and `preprocessor_config.json`.
        images: encoded images (JPEG, PNG, WebP), any size.

    Returns:
        `[images, hidden]`, float32, rows of length 1.

    Raises:
        UserError: no such folder, weights missing from it, or no such hidden state.
    """
    model = _load_encoder(encoder_folder, hidden_state)
    # PIL whether or not torchvision is there: the two resize differently, and a probe must not depend on it.
    processor = SiglipImageProcessorPil.from_pretrained(encoder_folder)
    rows = [np.empty((0, model.config.hidden_size), np.float32)]
    for start in range(0, len(images), batch_size):
        batch = [Image.open(io.BytesIO(image)).convert("RGB") for image in images[start : start + batch_size]]
        pixels = processor(images=batch, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
        features = torch.nn.functional.normalize(states[hidden_state].mean(dim=1), dim=-1)
        rows.append(features.numpy())
    return np.concatenate(rows)


def linear_probe(train_x: Features, train_y: Labels, test_x: Features, test_y: Labels, *, seed: int) -> ProbeResult:
    """Fit logistic regressions (lbfgs, L2, at most 1000 iterations) over `C_GRID` and score them on the test set.

    C is chosen on a stratified held-out fifth of the training set drawn with `seed`, the strongest regularisation
    winning ties, then refitted on all of it.

    Args:
        train_x, test_x: `[samples, hidden]`.
        train_y, test_y: `[samples]`, class indices.

    Raises:
        UserError: too few training samples of a class to hold some out.
    """
    classes, counts = np.unique(train_y, return_counts=True)
    if len(classes) < 2 or counts.min() < 2 or _HELD_OUT * len(train_y) < len(classes):
        raise UserError(
            f"linear probe: expected at least 2 classes, 2 training samples of each and {1 / _HELD_OUT:.0f} a class "
            f"overall, found {len(train_y)} samples of {len(classes)} classes, the rarest with "
            f"{counts.min(initial=len(train_y))}; add training samples"
        )
    fit_x, held_x, fit_y, held_y = train_test_split(
        train_x, train_y, test_size=_HELD_OUT, stratify=train_y, random_state=seed
    )
    held_correct = [_correct(c, fit_x, fit_y, held_x, held_y) for c in C_GRID]
    test_correct = [_correct(c, train_x, train_y, test_x, test_y) for c in C_GRID]
    chosen = int(np.argmax(held_correct))
    best = int(np.argmax(test_correct))
    interval = wilson(test_correct[chosen], len(test_y))
    return ProbeResult(
        accuracy=test_correct[chosen] / len(test_y),
        low=interval.low,
        high=interval.high,
        correct=test_correct[chosen],
        total=len(test_y),
        c=C_GRID[chosen],
        accuracy_best_c_on_test=test_correct[best] / len(test_y),
        c_best_on_test=C_GRID[best],
        train_total=len(train_y),
    )


def digits_images(image_size: int) -> LabelledImages:
    """scikit-learn's bundled handwritten digits (1797 of 8x8, ten classes) as RGB PNGs of `image_size` pixels a side.

    The split is stratified and always the same: 1257 to train, 540 to test.
    """
    digits = load_digits()
    images = [_digit_png(digit, image_size) for digit in digits.images]
    train, test = train_test_split(
        np.arange(len(images)), test_size=_DIGITS_TEST, stratify=digits.target, random_state=0
    )
    labels = digits.target.astype(np.int64)
    return LabelledImages(
        train_images=tuple(images[i] for i in train),
        train_labels=labels[train],
        test_images=tuple(images[i] for i in test),
        test_labels=labels[test],
    )


def _load_encoder(folder: Path, hidden_state: int) -> SiglipVisionModel:
    for name in ("config.json", "preprocessor_config.json"):
        if not (folder / name).is_file():
            raise UserError(f"probe: expected a Hugging Face encoder in {folder}, found no {name}; export one there")
    loaded: Any = SiglipVisionModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model: SiglipVisionModel = loaded[0]
    # An absent tensor would be drawn at random and the probe would measure noise. What lies behind the last layer is
    # not read here, and an export that dropped it is a good one.
    missing = sorted(name for name in loaded[1]["missing_keys"] if not name.startswith(("post_layernorm.", "head.")))
    if missing:
        raise UserError(
            f"probe: expected every encoder weight in {folder}, found {len(missing)} missing (first: {missing[0]}); "
            "export the encoder again"
        )
    states = model.config.num_hidden_layers + 1
    if not -states <= hidden_state < states:
        raise UserError(
            f"probe: expected hidden_state in {-states}..{states - 1} ({states - 1} layers in {folder}), "
            f"found {hidden_state}; choose one of them"
        )
    return model


def _correct(c: float, train_x: Features, train_y: Labels, test_x: Features, test_y: Labels) -> int:
    # The default penalty is L2; naming it is deprecated.
    model = LogisticRegression(C=c, solver="lbfgs", max_iter=1000)
    model.fit(train_x, train_y)
    return int((model.predict(test_x) == test_y).sum())


def _digit_png(digit: npt.NDArray[np.float64], image_size: int) -> bytes:
    """One `[8, 8]` digit with values 0..16 as a PNG."""
    pixels = np.round(digit * (255 / 16)).astype(np.uint8)
    image = Image.fromarray(pixels).resize((image_size, image_size), Image.Resampling.BICUBIC).convert("RGB")
    png = io.BytesIO()
    image.save(png, format="PNG")
    return png.getvalue()
