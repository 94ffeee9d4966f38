import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import SiglipImageProcessorPil, SiglipVisionModel

from pivot_megatron.convert.tiny_checkpoints import make_encoder
from pivot_megatron.errors import UserError
from pivot_megatron.probe.interval import difference, wilson
from pivot_megatron.probe.linear import C_GRID, LabelledImages, digits_images, linear_probe, patch_features


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    make_encoder(folder, image_size=32, patch_size=8, hidden_size=32, layers=3, heads=2, ffn=48, seed=0)
    return folder


@pytest.fixture(scope="module")
def digits() -> LabelledImages:
    return digits_images(24)


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    # Closed form; 81/263 is Newcombe's worked example (0.2553, 0.3662) and 0/20 and 29/29 are his boundary cases.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_matches_published_values(correct: int, total: int, low: float, high: float) -> None:
    interval = wilson(correct, total)
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


def test_wilson_refuses_impossible_counts() -> None:
    with pytest.raises(ValueError, match="correct=3, total=2"):
        wilson(3, 2)


def test_difference_matches_published_values() -> None:
    # Newcombe (1998), example (a): 56/70 against 48/80, method 10.
    change = difference(48 / 80, wilson(48, 80), 56 / 70, wilson(56, 70))
    assert change.low == pytest.approx(0.0524, abs=5e-5)
    assert change.high == pytest.approx(0.3339, abs=5e-5)
    assert 0.0 not in change
    assert 0.0 in difference(0.5, wilson(5, 10), 0.6, wilson(6, 10))


def test_planted_features_score_everything() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 4
    features = (4 * np.eye(4)[labels] + 0.05 * rng.normal(size=(200, 4))).astype(np.float32)
    result = linear_probe(features[:120], labels[:120], features[120:], labels[120:], seed=0)
    assert (result.accuracy, result.correct, result.total, result.train_total) == (1.0, 80, 80, 120)
    assert (result.low, result.high) == (wilson(80, 80).low, 1.0)


def test_random_features_score_chance() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(800) % 4
    features = rng.normal(size=(800, 8)).astype(np.float32)
    result = linear_probe(features[:400], labels[:400], features[400:], labels[400:], seed=0)
    assert result.accuracy == pytest.approx(0.25, abs=0.07)
    assert result.accuracy_best_c_on_test >= result.accuracy
    assert result.c in C_GRID and result.c_best_on_test in C_GRID
    assert result == linear_probe(features[:400], labels[:400], features[400:], labels[400:], seed=0)


def test_too_few_samples_are_the_users_error() -> None:
    labels = np.array([0, 0, 0, 1])
    features = np.zeros((4, 2), np.float32)
    with pytest.raises(UserError, match="4 samples of 2 classes, the rarest with 1"):
        linear_probe(features, labels, features, labels, seed=0)


@pytest.mark.parametrize("hidden_state", [0, -2, -1])
def test_features_are_what_the_layers_give(encoder: Path, digits: LabelledImages, hidden_state: int) -> None:
    raw = digits.test_images[:5]
    found = patch_features(encoder, raw, hidden_state=hidden_state, batch_size=2)
    model = SiglipVisionModel.from_pretrained(encoder)
    pixels = SiglipImageProcessorPil.from_pretrained(encoder)(
        images=[Image.open(io.BytesIO(image)).convert("RGB") for image in raw], return_tensors="pt"
    )["pixel_values"]
    with torch.no_grad():
        state = model.embeddings(pixels)
        for layer in model.encoder.layers[: len(model.encoder.layers) + 1 + hidden_state if hidden_state else 0]:
            state = layer(state, attention_mask=None)
    mean = state.mean(dim=1)
    expected = mean / mean.norm(dim=-1, keepdim=True)
    assert found.shape == (5, 32) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


def test_dropping_the_last_layer_keeps_the_feature(encoder: Path, digits: LabelledImages, tmp_path: Path) -> None:
    model = SiglipVisionModel.from_pretrained(encoder)
    config = type(model.config).from_pretrained(encoder, num_hidden_layers=2, vision_use_head=False)
    config.save_pretrained(tmp_path)
    SiglipImageProcessorPil.from_pretrained(encoder).save_pretrained(tmp_path)
    weights = load_file(encoder / "model.safetensors")
    dropped = ("encoder.layers.2.", "post_layernorm.", "head.")
    kept = {name: w for name, w in weights.items() if not name.removeprefix("vision_model.").startswith(dropped)}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    original = patch_features(encoder, digits.test_images[:3], hidden_state=-2)
    np.testing.assert_array_equal(patch_features(tmp_path, digits.test_images[:3], hidden_state=-1), original)


def test_no_images_give_no_rows(encoder: Path) -> None:
    assert patch_features(encoder, [], hidden_state=-1).shape == (0, 32)


def test_missing_weights_are_the_users_error(encoder: Path, digits: LabelledImages, tmp_path: Path) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((encoder / name).read_bytes())
    weights = load_file(encoder / "model.safetensors")
    del weights["vision_model.encoder.layers.0.mlp.fc1.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 missing \(first: .*layers\.0\.mlp\.fc1\.weight\)"):
        patch_features(tmp_path, digits.test_images[:1], hidden_state=-1)


def test_wrong_folder_and_layer_are_the_users_error(encoder: Path, digits: LabelledImages, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        patch_features(tmp_path, digits.test_images[:1], hidden_state=-1)
    with pytest.raises(UserError, match=r"-4\.\.3 .*found 4"):
        patch_features(encoder, digits.test_images[:1], hidden_state=4)


def test_digits_are_fixed_and_stratified(digits: LabelledImages) -> None:
    assert (len(digits.train_images), len(digits.test_images)) == (1257, 540)
    assert set(np.bincount(digits.test_labels)) <= {52, 53, 54, 55}
    assert digits.test_images[0].startswith(b"\x89PNG") and digits_images(24).test_images == digits.test_images
    image = Image.open(io.BytesIO(digits.test_images[0]))
    assert (image.size, image.mode) == ((24, 24), "RGB")
    assert not set(digits.train_images) & set(digits.test_images)
