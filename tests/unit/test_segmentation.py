"""`pivot probe segmentation`: planted colors, noise, several encoders, pictures, and what a user may get wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pivot_megatron.cli import main
from pivot_megatron.convert.tiny_checkpoints import make_encoder
from pivot_megatron.probe.label_maps import LabelMap, class_colors, side_by_side
from pivot_megatron.probe.segment import shown_classes
from tests.html_page import whole_page
from tests.masked import COLORS, corners, pairs, png, write_folder, write_parquet


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folders = [tmp_path_factory.mktemp("encoder") for _ in range(2)]
    for seed, folder in enumerate(folders):
        size = 32 + 16 * seed
        make_encoder(folder, image_size=size, patch_size=8, hidden_size=32, layers=2, heads=2, ffn=48, seed=seed)
    return folders


def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["probe", "segmentation", *map(str, arguments), "--out", str(tmp_path / "out")])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(("planted", "low", "high"), [(True, 0.99, 1.0), (False, 0.0, 0.3)])
def test_colors_are_read_and_noise_is_not(
    planted: bool, low: float, high: float, encoders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of four classes, of which each patch shows one."""
    train = write_folder(tmp_path, "training", pairs(64, 1, planted, middle=True))
    test = write_parquet(tmp_path / "test" / "validation-0.parquet", pairs(24, 2, planted, middle=True), 10)
    words = [*encoders, "--train", train, "--test", test.parent, "--classes", 9, "--epochs", 12, "--seeds", 2]
    code, out, err = run(tmp_path, capsys, *words, "--json")
    found = json.loads(out)
    assert code == 0 and json.loads((tmp_path / "out" / "segmentation.json").read_text()) == found
    assert (found["train_images"], found["test_images"]) == (64, 24)
    assert found["classes"] == [0, 1, 2, 3] and found["unseen"] == []
    for score in found["scores"]:
        assert low <= score["mean"] <= high and score["features"] == "hidden_states[1]"
        assert len(score["seeds"]) == 2 and all(len(seed["epochs"]) == 12 for seed in score["seeds"])
        means = [np.mean(seed["recall"]) for seed in score["seeds"]]
        assert score["mean"] == pytest.approx(np.mean(means))
        assert score["seeds"][0]["epochs"] != score["seeds"][1]["epochs"]
        for seed, mean in zip(score["seeds"], means):
            recalls = [epoch["recall"] for epoch in seed["epochs"]]
            assert max(recalls) == recalls[seed["best_epoch"] - 1] == pytest.approx(mean)
    assert "train, 64 of 64 masks" in err and "head 2 of 2: epoch 12 of 12, macro recall" in err
    page = whole_page(tmp_path / "out" / "report.html")
    assert "Macro recall" in page.text and "Maps" in page.text
    picture = Image.open(tmp_path / "out" / "segmentation.png")
    assert picture.width > 4 * 100 and picture.height > 6 * 100


def test_an_encoder_does_not_differ_from_itself(
    encoders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = (write_folder(tmp_path, split, pairs(8, n)) for n, split in enumerate(("a", "b")))
    words = [encoders[0], encoders[0], "--train", train, "--test", test, "--classes", 4, "--epochs", 2, "--seeds", 2]
    code, out, err = run(tmp_path, capsys, *words)
    assert code == 0 and "macro recall" in out and "last epoch  precision" in out
    assert out.splitlines()[2].endswith("+0.00 (+0.00 to +0.00, inside the noise)")
    assert err.count("train, 8 of 8 images") == err.count("GiB") == 1  # the second time its features are there
    assert err.count("head 2 of 2: epoch 2 of 2") == 1  # and its heads


def test_what_does_not_go_together_is_one_line(
    encoders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = (write_folder(tmp_path, split, pairs(3, n)) for n, split in enumerate(("a", "b")))
    (tmp_path / "plain").mkdir()
    flat = write_folder(tmp_path / "plain", "c", [(png(COLORS[one]), png(one)) for one in [np.zeros((9, 9), np.uint8)]])
    for words, message in (
        (["--train", train, "--test", train], "expected images that are in one alone, found 3 in both (first: "),
        (["--train", train, "--test", test, "--classes", 3], "expected classes 0 to 2, found 3; set --classes"),
        (["--train", train, "--test", test, "--classes", 1], "2 or more classes, found 5, 6, 64 and 1"),
        (["--train", train, "--test", test, "--seeds", 0], "expected 1 or more"),
        (["--train", train, "--test", flat], "expected masks of 2 classes or more, found 1"),
        (["--train", train, "--test", tmp_path / "nowhere"], "nowhere: no such folder"),
    ):
        code, _, err = run(tmp_path, capsys, encoders[0], *words)
        assert code == 2 and message in err.splitlines()[-1]
    code, _, err = run(tmp_path, capsys, encoders[0], tmp_path / "nothing", "--train", train, "--test", test)
    assert code == 2 and "nothing" in err and len(err.strip().splitlines()) == 1


def test_maps_stand_beside_the_mask_in_its_colors() -> None:
    """An image of 40 x 20, whose patches leave out a fifth of its width and a half of its height."""
    colors = class_colors(151)
    assert len({tuple(color) for color in colors.tolist()}) == 151 and colors[0].tolist() == [0, 0, 0]
    mask = corners(40, 20, 0.5, 0.5)
    labels = LabelMap(np.array([[3, 2]]), (0.5, 0.8))
    sheet = np.asarray(side_by_side([(png(COLORS[mask]), png(mask))], [[labels]], ["a/long/path" * 20], 151))
    top, width = 22, 286
    cells = [sheet[top : top + 140, 6 + n * width : 286 + n * width] for n in range(3)]
    assert [cells[0][y, x].tolist() for y in (9, 130) for x in (9, 270)] == COLORS.tolist()
    assert [cells[1][y, x].tolist() for y in (9, 130) for x in (9, 270)] == colors[:4].tolist()
    white = [255, 255, 255]
    assert [cells[2][9, x].tolist() for x in (9, 110, 114, 222, 226)] == [
        *[colors[3].tolist()] * 2,
        *[colors[2].tolist()] * 2,
        white,
    ]
    assert cells[2][71, 9].tolist() == white


def test_a_map_shows_what_stands_before_the_background() -> None:
    """Background and something, background alone, nothing for sure, and something alone."""
    logits = torch.tensor([[9.0, -1.0, 0.5], [9.0, -1.0, -0.5], [-1.0, -2.0, -3.0], [-4.0, 3.0, -3.0]])
    assert shown_classes(logits).tolist() == [2, 0, 1, 1]
