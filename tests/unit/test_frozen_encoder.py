"""Features of frozen encoders against transformers itself, from folders, exports and checkpoints."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import SiglipImageProcessorPil, SiglipVisionModel

from pivot_megatron.convert.commands import export_checkpoint, import_checkpoint
from pivot_megatron.convert.tiny_checkpoints import make_encoder, make_head, make_tokenizer
from pivot_megatron.errors import UserError
from pivot_megatron.probe.digits import digits
from pivot_megatron.probe.features import pooled_features
from pivot_megatron.probe.image_set import ImageSet
from pivot_megatron.probe.kept import kept
from pivot_megatron.probe.opening import opened

EMPTY = ImageSet.of_bytes([], np.empty(0, np.int64), ["a"])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    make_encoder(folder, image_size=32, patch_size=8, hidden_size=32, layers=3, heads=2, ffn=48, seed=0)
    return folder


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return digits(24)[1]


def features(folder: Path, images: ImageSet, count: int, layer: int | None = None, batch: int = 2) -> np.ndarray:
    with opened(folder, layer) as encoder:
        return pooled_features(encoder, images, range(count), batch)


@pytest.mark.parametrize("layer", [-3, -2, -1, None])
def test_features_are_what_the_layers_give(encoder: Path, images: ImageSet, layer: int | None) -> None:
    found = features(encoder, images, 5, layer)
    model = SiglipVisionModel.from_pretrained(encoder)
    pixels = SiglipImageProcessorPil.from_pretrained(encoder)(
        images=[Image.open(io.BytesIO(images.read(n))).convert("RGB") for n in range(5)], return_tensors="pt"
    )["pixel_values"]
    with torch.no_grad():
        state = model.embeddings(pixels)
        for one in model.encoder.layers[: len(model.encoder.layers) + 1 + (layer or -2)]:
            state = one(state, attention_mask=None)
    mean = state.mean(dim=1)
    expected = mean / mean.norm(dim=-1, keepdim=True)
    assert found.shape == (5, 32) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


def test_no_images_give_no_rows(encoder: Path) -> None:
    with opened(encoder) as found:
        assert pooled_features(found, EMPTY).shape == (0, 32)


def test_what_was_computed_is_kept(encoder: Path, images: ImageSet, tmp_path: Path) -> None:
    with opened(encoder) as found:
        first = pooled_features(found, images, range(4), cache=tmp_path)
        (file,) = tmp_path.iterdir()
        np.save(file, first + 1)
        np.testing.assert_array_equal(pooled_features(found, images, range(4), cache=tmp_path), first + 1)
        assert pooled_features(found, images, range(3), cache=tmp_path).shape == (3, 32)
    with opened(encoder, -1) as other:
        pooled_features(other, images, range(4), cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_layers_are_counted_from_the_originals_end(encoder: Path, images: ImageSet, tmp_path: Path) -> None:
    """An export that ends where features are taken has fewer layers, and the same ones."""
    head, checkpoint, export = tmp_path / "head", tmp_path / "checkpoint", tmp_path / "export"
    tokenizer = make_tokenizer(["a red circle"], 300)
    make_head(head, tokenizer, hidden_size=32, layers=1, heads=2, kv_heads=2, ffn=48, tied=True, seed=3)
    import_checkpoint(encoder, head, checkpoint, None, seed=0)
    export_checkpoint(checkpoint, "encoder", export, "drop", None)
    for layer in (-3, -2, None):
        for folder in (export, checkpoint):
            np.testing.assert_array_equal(features(folder, images, 3, layer), features(encoder, images, 3, layer))
            with opened(folder, layer) as found, opened(encoder, layer) as whole:
                assert found.place == whole.place
    with pytest.raises(UserError, match=r"expected -2 to -3, the layers it holds .*found -1"), opened(export, -1):
        pass
    with opened(checkpoint, projected=True) as found, opened(checkpoint) as bare:
        assert found.width == 32 and found.fingerprint != bare.fingerprint
    import_checkpoint(encoder, head, tmp_path / "other", None, seed=1)
    with opened(checkpoint, projected=True) as found, opened(tmp_path / "other", projected=True) as other:
        assert found.fingerprint != other.fingerprint  # they differ in the projector alone


@pytest.mark.parametrize("mapped", [False, True])
def test_what_is_kept_and_cannot_be_read_is_made_anew(mapped: bool, tmp_path: Path) -> None:
    def made() -> np.ndarray:
        return np.ones((2, 3), np.float32)

    for content in (b"", b"not an array", None):
        assert isinstance(kept(made, tmp_path, "told", mapped), np.memmap) == mapped
        (file,) = tmp_path.iterdir()
        file.write_bytes(file.read_bytes()[:-5] if content is None else content)
        np.testing.assert_array_equal(kept(made, tmp_path, "told", mapped), made())
    assert [path.suffix for path in tmp_path.iterdir()] == [".npy"]


def test_a_pickle_is_refused(encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((encoder / "config.json").read_bytes())
    torch.save(load_file(encoder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle"), opened(tmp_path):
        pass


def test_missing_weights_are_the_users_error(encoder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((encoder / name).read_bytes())
    weights = load_file(encoder / "model.safetensors")
    del weights["vision_model.encoder.layers.0.mlp.fc1.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 missing \(first: .*layers\.0\.mlp\.fc1\.weight\)"), opened(tmp_path):
        pass


def test_wrong_folder_layer_and_image_are_the_users_error(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)), opened(tmp_path):
        pass
    with pytest.raises(UserError, match=r"-1 to -3, .* of an encoder of 3, .*found -4"), opened(encoder, -4):
        pass
    with pytest.raises(UserError, match="has no projector"), opened(encoder, projected=True):
        pass
    broken = ImageSet.of_bytes([b"\xff\xd8 not a JPEG"], np.zeros(1, np.int64), ["a"])
    with opened(encoder) as found, pytest.raises(UserError, match="image 0: not an image that can be read"):
        pooled_features(found, broken)
