"""`pivot probe gradcam`: figures, maps and scores of small models, and what a user may get wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pivot_megatron.cli import main
from pivot_megatron.config.schema import AnyRes
from pivot_megatron.convert.commands import import_checkpoint, write_import
from pivot_megatron.convert.load import hf_source
from pivot_megatron.convert.store import Description
from pivot_megatron.convert.tiny_checkpoints import make_encoder, make_head, make_tokenizer
from pivot_megatron.data.sample import Pair
from pivot_megatron.data_prep.synthetic import write_conversations, write_pairs
from pivot_megatron.probe import gradcam
from pivot_megatron.probe.gradcam_figure import Panel, write_figure
from pivot_megatron.probe.patch_grid import Box, PatchGrid
from pivot_megatron.probe.questions import Question
from tests.html_page import whole_page

SAMPLE: dict[str, Any] = {"image": "0.png", "question": "what is it", "chosen": "a red circle", "rejected": "a square"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints `one` and `two`: 6 x 6 patches of 48 of 52 pixels a side; `small`: 2 x 2; `tiles`; and images of 104 x 52."""
    folder = tmp_path_factory.mktemp("models")
    make_encoder(folder / "encoder", image_size=16, patch_size=8, hidden_size=32, layers=3, heads=2, ffn=48, seed=0)
    tokenizer = make_tokenizer(["what is it", "a red circle", "a square"], 300)
    make_head(folder / "llm", tokenizer, hidden_size=32, layers=2, heads=2, kv_heads=2, ffn=48, tied=True, seed=3)
    for seed, (name, size) in enumerate({"one": 52, "two": 52, "small": 16}.items()):
        import_checkpoint(folder / "encoder", folder / "llm", folder / name, None, seed, size)
    tiles = Description(folder / "encoder", folder / "llm", -2, anyres=AnyRes())
    sources = {
        name: hf_source(tiles.architecture(), name, folder / where)
        for name, where in (("encoder", "encoder"), ("llm", "llm"))
    }
    write_import(tiles, sources, folder / "tiles", seed=0)
    draw = np.random.default_rng(0)
    for n in range(2):
        Image.fromarray(draw.integers(0, 256, (52, 104, 3), np.uint8)).save(folder / f"{n}.png")
    return folder


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def command(models: list[str], samples: Path | list[dict[str, Any]] | str, *words: object) -> tuple[int, str, str]:
        """Samples: where they are, records, or a line as it stands."""
        file = folders / f"{tmp_path.name}.jsonl"
        if isinstance(samples, list):
            file.write_text("".join(json.dumps(one) + "\n" for one in samples))
        elif isinstance(samples, str):
            file.write_text(samples)
        where = samples if isinstance(samples, Path) else file
        given = [*(folders / model for model in models), "--samples", where, "--out", tmp_path / "out", *words]
        code = main(["probe", "gradcam", *map(str, given)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def test_maps_figures_and_scores(run: Run, tmp_path: Path) -> None:
    boxed = {**SAMPLE, "box": [10, 4, 58, 30.5]}
    samples = [boxed, {**SAMPLE, "image": "1.png", "box": None}, boxed]
    code, out, _ = run(["one", "two"], samples, "--objective", "dpo", "sft", "--steps", 2, "--rate", 1e-3)
    found = json.loads((tmp_path / "out" / "gradcam.json").read_text())
    assert code == 0 and "boxes: 2 of 3 samples" in out and out.count("against the first") == 2
    labels = [score["encoder"] for score in found["scores"]]
    assert [label.split("/")[-1] for label in labels] == ["one, dpo", "one, sft", "two, dpo", "two, sft"]
    assert len(found["against_the_first"]) == len(found["pointing"]["against_the_first"]) == 3
    for place, label in enumerate(labels):
        seen = [sample["seen"][place] for sample in found["samples"]]
        maps = [np.load(tmp_path / "out" / one["map"]) for one in seen]
        assert all(one["encoder"] == label and len(one["losses"]) == 3 for one in seen)
        for values in maps:
            assert values.shape == (6, 6) and (values.min(), values.max()) == (0.0, 1.0)
        assert np.array_equal(maps[0], maps[2]) and not np.array_equal(maps[0], maps[1])  # weights are put back
        assert seen[0]["losses"] == seen[2]["losses"] and seen[0]["losses"][0] > seen[0]["losses"][2]
        cover = PatchGrid(6, 6, 8.0, 16.0).cover(Box(10, 4, 58, 30.5))
        energy = float((maps[0] * cover).sum() / maps[0].sum())
        assert seen[0]["energy"] == pytest.approx(energy) == found["scores"][place]["mean"]
        assert seen[0]["energy_chance"] == pytest.approx(48 * 26.5 / (96 * 48))
        assert seen[0]["pointing"] == found["pointing"]["scores"][place]["mean"] and "energy" not in seen[1]
    assert found["samples"][0]["seen"][0]["losses"][0] == pytest.approx(np.log(2))  # the model is its own reference
    page = whole_page(tmp_path / "out" / "report.html")
    assert len(page.addresses) == 3 and page.text.count("a red circle") == 3
    for sample in found["samples"]:
        with Image.open(tmp_path / "out" / sample["figure"]) as figure:
            assert figure.width == 5 * 384


def test_places_and_no_steps(run: Run, tmp_path: Path) -> None:
    maps = []
    for at in ("input", "output"):
        assert run(["one"], [SAMPLE], "--steps", 0, "--at", at)[0] == 0
        maps.append(np.load(tmp_path / "out" / "maps" / "0001-1.npy"))
    assert not np.allclose(*maps, atol=1e-3)


def test_pairs_of_shards_have_no_box(run: Run, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", 8, seed=1, image_size=48, text_only=0.5, progress=False)
    code, out, _ = run(["one", "one"], tmp_path / "pairs", "--count", 2, "--steps", 1)
    assert code == 0 and out.splitlines() == [f"boxes: 0 of 2 samples; figures: {tmp_path / 'out'}"]
    found = json.loads((tmp_path / "out" / "gradcam.json").read_text())
    assert found["scores"] == found["pointing"]["scores"] == [] and len(found["samples"]) == 2
    code, _, err = run(["one"], tmp_path / "pairs", "--count", 9)
    assert code == 2 and "expected 9 pairs with an image, found" in err and "lower --count" in err
    write_conversations(tmp_path / "talks", 2, seed=1, image_size=48, progress=False)
    code, _, err = run(["one"], tmp_path / "talks")
    assert code == 2 and "expected one or more pairs with an image, found 0" in err


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"bbox": [0, 0, 1, 1]}, "found 'bbox'"),
        ({"image": None}, "expected a path in 'image', found None"),
        ({"image": "none.png"}, "none.png: cannot read the image (No such file or directory)"),
        ({"image": "llm/config.json"}, "not an image that can be read"),
        ({"rejected": 3}, "expected text in 'rejected', found int"),
        ({"rejected": "a red circle"}, "the same: nothing to prefer"),
        ({"chosen": "<image>"}, "never in an answer"),
        ({"box": [0, 0, 105, 52]}, "in pixels within the image's 104 x 52, found [0, 0, 105, 52]"),
        ({"box": [0, 0, 104, 52.5]}, "in pixels within the image's"),
        ({"box": [-1, 0, 104, 52]}, "in pixels within the image's"),
        ({"box": [20, 0, 20, 52]}, "in pixels within the image's"),
        ({"box": [0, 30, 20, 29]}, "in pixels within the image's"),
        ({"box": [0, 0, 20]}, "in pixels within the image's"),
        ({"box": [0, 0, 20, True]}, "in pixels within the image's"),
        ({"box": [0, 0, 20, float("nan")]}, "in pixels within the image's"),
        ({"box": [97, 0, 104, 52]}, "found its edge past the last whole patch"),
        ({"question": "red " * 40000}, "of 32768"),
    ],
)
def test_a_wrong_sample_is_named(change: dict[str, Any], told: str, run: Run, tmp_path: Path) -> None:
    code, _, err = run(["one"], [SAMPLE, {**SAMPLE, **change}])
    assert code == 2 and ".jsonl: line 2: " in err and told in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()  # it is seen before any work is done


@pytest.mark.parametrize(
    ("samples", "words", "told"),
    [
        ("{", (), "line 1: expected JSON"),
        ("[]", (), "line 1: expected an object, found list"),
        ("\n", (), "expected one or more pairs with an image, found 0"),
        (
            Path("/nowhere.jsonl"),
            (),
            "/nowhere.jsonl: expected a file of JSON lines, or a folder of shards, found none",
        ),
        ([SAMPLE], ("--count", 0), "--count: expected 1 or more, found 0"),
        ([SAMPLE], ("--steps", -1), "--steps, --rate: expected 0 or more, and a rate above 0, found -1 and"),
        ([SAMPLE], ("--rate", 0), "and a rate above 0, found 20 and 0.0"),
    ],
)
def test_wrong_words_are_one_line(samples: Any, words: tuple[object, ...], told: str, run: Run) -> None:
    code, _, err = run(["one"], samples, *words)
    assert code == 2 and told in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("small", "line 1: expected 3 x 3 patches or more, since the map's border is replaced, found 2 x 2 by"),
        ("tiles", "tiles: expected a model that sees an image as one grid of patches, found tiles (model.anyres)"),
        ("encoder", "encoder: expected a checkpoint or a run's folder with one, found none"),
    ],
)
def test_a_wrong_model_is_named_before_any_is_loaded(model: str, told: str, run: Run, tmp_path: Path) -> None:
    code, _, err = run(["one", model], [SAMPLE])
    assert code == 2 and told in err and len(err.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_gradient_without_a_map_is_named(value: float, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradcam, "patch_gradient", lambda *_: (torch.full((36, 32), value), 0.0))
    code, _, err = run(["one"], [SAMPLE], "--steps", 0)
    assert code == 2 and "line 1: no map of its gradient (expected finite values that differ, got" in err


def test_a_figure_has_the_map_where_the_patches_are(tmp_path: Path) -> None:
    """The upper left quarter of a grey image is high: red in the figure, and the rest blue."""
    Image.new("RGB", (80, 80), (128, 128, 128)).save(tmp_path / "grey.png")
    image = (tmp_path / "grey.png").read_bytes()
    pair = Pair("", image, "what costs $5 and $6?", "a", "b", {})
    saliency = np.zeros((4, 4))
    saliency[:2, :2] = 1.0
    write_figure(
        tmp_path / "f.png",
        Question("", pair, image, (80, 80), None),
        [Panel("m", saliency, PatchGrid(4, 4, 20, 20), "")],
    )
    shown = np.asarray(Image.open(tmp_path / "f.png").convert("RGB")).astype(int)
    high, low = (np.argwhere(shown[..., a] > shown[..., b] + 30) for a, b in ((0, 2), (2, 0)))
    assert len(high) > 1000 and len(low) > 2 * len(high)
    both = np.concatenate([high, low])
    corner, side = both.min(axis=0), np.ptp(both, axis=0)
    assert (high.mean(axis=0) - corner) / side == pytest.approx([0.25, 0.25], abs=0.05)
    assert corner[1] > shown.shape[1] / 2  # right of the plain image
