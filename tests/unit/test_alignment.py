"""Mutual nearest neighbours and CKA against closed forms and scikit-learn, and `pivot probe alignment`."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from transformers import AutoModelForCausalLM, AutoTokenizer

from pivot_megatron.cli import main
from pivot_megatron.convert.tiny_checkpoints import make_encoder, make_head, make_tokenizer
from pivot_megatron.data_prep.synthetic import write_conversations
from pivot_megatron.errors import UserError
from pivot_megatron.probe.alignment import best_alignment, centred_kernel, linear_cka, mutual_neighbours, neighbours
from pivot_megatron.probe.captions import CaptionSet
from pivot_megatron.probe.features import layer_features
from pivot_megatron.probe.language_model import text_features
from pivot_megatron.probe.opening import opened
from tests.html_page import whole_page


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_neighbours_are_scikit_learns() -> None:
    features = drawn(60, 7)
    expected = NearestNeighbors(n_neighbors=6, metric="cosine").fit(features).kneighbors(return_distance=False)
    assert np.array_equal(np.sort(neighbours(features, 6)), np.sort(expected))
    with pytest.raises(UserError, match="1 to 59 neighbours of 60 samples, found 60"):
        neighbours(features, 60)


def test_mutual_neighbours_by_hand() -> None:
    one, other = torch.tensor([[1, 2], [0, 3], [0, 1]]), torch.tensor([[2, 1], [2, 3], [3, 4]])
    assert mutual_neighbours(one, other).tolist() == [1.0, 0.5, 0.0]


def test_cka_is_its_formula() -> None:
    """||Y'X||^2 / (||X'X|| ||Y'Y||) of centred features; nothing changes under rotation and scale."""
    x, y = drawn(40, 5).double(), drawn(40, 9, seed=1).double()
    a, b = x - x.mean(0), y - y.mean(0)
    expected = torch.linalg.norm(b.T @ a) ** 2 / (torch.linalg.norm(a.T @ a) * torch.linalg.norm(b.T @ b))
    found = linear_cka(centred_kernel(x), centred_kernel(y))
    assert found == pytest.approx(float(expected), abs=1e-12) and 0.0 < found < 1.0
    turned = 3.0 * x @ torch.linalg.qr(drawn(5, 5, seed=2).double())[0] + 7.0
    assert linear_cka(centred_kernel(x), centred_kernel(turned)) == pytest.approx(1.0, abs=1e-12)
    assert linear_cka(centred_kernel(x), centred_kernel(torch.ones(40, 3))) == 0.0


def test_a_set_is_aligned_with_itself_and_not_with_noise() -> None:
    layers = [drawn(200, 16, seed=n) for n in range(3)]
    same = best_alignment(layers, [drawn(200, 8, seed=9), layers[1]], k=10)
    assert same.mutual == 1.0 and same.layers == same.cka_layers == (1, 1) and same.cka == pytest.approx(1.0)
    noise = best_alignment(layers, [drawn(200, 8, seed=9)], k=10)
    assert noise.mutual == pytest.approx(10 / 199, abs=0.03)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Path]:
    folder = tmp_path_factory.mktemp("models")
    for seed in range(2):
        made = folder / f"encoder-{seed}"
        made.mkdir()
        make_encoder(made, image_size=16, patch_size=8, hidden_size=32, layers=3, heads=2, ffn=48, seed=seed)
    tokenizer = make_tokenizer(["a red circle", "a blue square in a corner"], 300)
    make_head(folder / "llm", tokenizer, hidden_size=32, layers=2, heads=2, kv_heads=2, ffn=48, tied=True, seed=3)
    return [folder / "encoder-0", folder / "encoder-1"], folder / "llm"


def captioned(folder: Path, count: int) -> Path:
    folder.mkdir()
    draw = np.random.default_rng(0)
    with tarfile.open(folder / "a.tar", "w") as file:
        for n in range(count):
            image = io.BytesIO()
            Image.fromarray(draw.integers(0, 256, (16, 16, 3), np.uint8)).save(image, "PNG")
            for name, content in ((f"./{n:03d}.png", image.getvalue()), (f"./{n:03d}.txt", b"caption " + b"x" * n)):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    return folder


def test_layers_of_texts_are_means_over_their_tokens(models: tuple[list[Path], Path], tmp_path: Path) -> None:
    texts = ["a red circle", "a blue square in a corner", "a"]
    found = text_features(models[1], texts, batch=2, cache=tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(models[1]), AutoTokenizer.from_pretrained(models[1])
    for n, text in enumerate(texts):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
        for layer, state in enumerate(states[1:]):
            torch.testing.assert_close(found[layer, n], state[0].mean(dim=0), atol=1e-5, rtol=1e-5)
    assert torch.equal(text_features(models[1], texts, cache=tmp_path), found)
    with pytest.raises(UserError, match="expected a Hugging Face language model"):
        text_features(tmp_path, texts)
    bare = shutil.copytree(models[1], tmp_path / "bare", ignore=shutil.ignore_patterns("*token*", "vocab*", "merges*"))
    with pytest.raises(UserError, match="bare: expected a tokenizer, found"):
        text_features(bare, texts)


def test_layers_of_images_end_with_the_features(models: tuple[list[Path], Path], tmp_path: Path) -> None:
    pairs = CaptionSet.opened(captioned(tmp_path / "pairs", 5), 5)
    with opened(models[0][0]) as encoder:
        found = layer_features(encoder, pairs, batch=2)
        patches = encoder.patches([(name, pairs.read(n)) for n, name in enumerate(pairs.names)])
    assert found.shape == (2, 5, 32)  # two of three layers: SigLIP's features are taken before the last
    torch.testing.assert_close(found[-1], torch.stack([one.mean(dim=0) for one in patches]))


def test_captions_of_shards_are_first_answers(tmp_path: Path) -> None:
    write_conversations(tmp_path / "shards", 6, seed=1, image_size=48, kind="caption")
    found = CaptionSet.opened(tmp_path / "shards", 4)
    assert len(found) == 4 and all(found.captions) and Image.open(io.BytesIO(found.read(3))).size == (48, 48)
    with pytest.raises(UserError, match="expected 7 images with a caption, found 6; lower --count"):
        CaptionSet.opened(tmp_path / "shards", 7)


def test_the_command(models: tuple[list[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (one, other), llm = models
    words = ["probe", "alignment", one, one, other, "--llm", llm, "--captions", captioned(tmp_path / "pairs", 40)]
    words += ["--count", 40, "--neighbours", 5, "--out", tmp_path / "out"]
    assert main(list(map(str, words))) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].endswith("+0.00 (+0.00 to +0.00, inside the noise)")
    assert lines[-1] == "chance, of one pair of layers: 12.82"
    found = json.loads((tmp_path / "out" / "alignment.json").read_text())
    assert [0.0 <= score["mean"] <= 1.0 and -1e-9 <= score["cka"] <= 1.0 for score in found["scores"]] == [True] * 3
    assert "chance" in whole_page(tmp_path / "out" / "report.html").text and found["versions"]["torch"]
    assert main([*map(str, words), "--count", "41"]) == 2
    assert "expected 41 images with a caption, found 40" in capsys.readouterr().err
