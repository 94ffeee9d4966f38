"""`pivot probe linear`: planted classes, chance, differences between encoders, and what a user may get wrong."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pivot_megatron.cli import main
from pivot_megatron.convert.tiny_checkpoints import make_encoder
from pivot_megatron.probe import linear
from pivot_megatron.probe.interval import Interval, wilson
from pivot_megatron.probe.table import Score, against_first, as_table
from tests.html_page import whole_page

COLORS = {"blue": (20, 30, 200), "green": (10, 160, 40), "red": (220, 20, 30)}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folders = [tmp_path_factory.mktemp("encoder") for _ in range(2)]
    for seed, folder in enumerate(folders):
        make_encoder(folder, image_size=16, patch_size=8, hidden_size=32, layers=2, heads=2, ffn=48, seed=seed)
    return folders


def write_set(folder: Path, count: int, seed: int, planted: bool) -> Path:
    """A folder a class: `planted`, all of its images are of a color of its own, with noise; else they are noise alone."""
    draw = np.random.default_rng(seed)
    for name, color in COLORS.items():
        (folder / name).mkdir(parents=True)
        for n in range(count):
            noise = draw.normal(0, 12, (16, 16, 3)) + (color if planted else draw.uniform(0, 255, 3))
            file = io.BytesIO()
            Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(file, "PNG")
            (folder / name / f"{n}.png").write_bytes(file.getvalue())
    return folder


def run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], *arguments: object, test: str = "test"
) -> tuple[int, str, str]:
    sets = ["--train", tmp_path / "train", "--test", tmp_path / test, "--out", tmp_path / "out"]
    code = main(["probe", "linear", *map(str, [*arguments, *sets])])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(("planted", "low", "high"), [(True, 1.0, 1.0), (False, 0.15, 0.5)])
def test_a_planted_class_is_read_and_noise_is_not(
    planted: bool, low: float, high: float, encoders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_set(tmp_path / "train", 14, 1, planted), write_set(tmp_path / "test", 30, 2, planted)
    code, out, _ = run(tmp_path, capsys, *encoders, "--per-class", 10, "--json")
    found = json.loads(out)
    assert code == 0 and json.loads((tmp_path / "out" / "linear.json").read_text()) == found
    assert (found["classes"], found["test_images"]) == (3, 90)
    page = whole_page(tmp_path / "out" / "report.html")
    assert "scikit-learn" in page.text and "3 classes, 10 training images of each, 90 test images" in page.text
    for score in found["scores"]:
        assert low <= score["mean"] <= high and low <= np.mean(score["prototypes"]) <= high
        assert len(score["draws"]) == 3 and score["features"] == "hidden_states[1]"


def test_an_encoder_does_not_differ_from_itself(
    encoders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fits: list[float] = []
    right = linear._right
    monkeypatch.setattr(linear, "_right", lambda c, *arrays: fits.append(c) or right(c, *arrays))
    write_set(tmp_path / "train", 12, 1, True), write_set(tmp_path / "test", 6, 2, True)
    code, out, err = run(tmp_path, capsys, encoders[0], encoders[0], "--per-class", 8)
    # 18 images of which none differs, and one more of each kind: Student's quantile, of 19 degrees of freedom.
    half = 2.09302405 * (2 / 19 / 20) ** 0.5
    assert code == 0 and f"+0.00 ({-100 * half:+.2f} to {100 * half:+.2f}, inside the noise)" in out
    assert err.count("train, ") == err.count("test, ") == 1  # the second time its features are there
    assert len(fits) == 3 * 2 * len(linear.C_GRID)  # and its fits


def test_prototypes_fit_nothing_and_are_scores_as_any(
    encoders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_set(tmp_path / "train", 4, 1, True), write_set(tmp_path / "test", 20, 2, True)
    _, logistic, _ = run(tmp_path, capsys, *encoders, "--per-class", 3, "--json")  # too few to hold some out
    monkeypatch.setattr(linear, "LogisticRegression", lambda **_: pytest.fail("fitted"))
    code, out, _ = run(tmp_path, capsys, *encoders, "--per-class", 3, "--classifier", "prototypes", "--json")
    found = json.loads(out)
    assert not logistic and code == 0 and found["settings"]["classifier"] == "prototypes"
    for score in found["scores"]:
        assert (
            score["mean"] == pytest.approx(np.mean([draw["accuracy"] for draw in score["draws"]]))
            and score["mean"] > 0.9
        )
        assert score["interval"]["low"] < score["mean"] and len(score["draws"]) == 3
    (change,) = found["against_the_first"]
    assert change["difference"] == pytest.approx(found["scores"][1]["mean"] - found["scores"][0]["mean"])
    assert change["interval"]["low"] < change["difference"] < change["interval"]["high"]
    page = whole_page(tmp_path / "out" / "report.html")
    assert "read by the nearest class mean from" in page.text and "C is chosen" not in page.text


def test_a_prototypes_column_is_that_classifiers_mean(
    encoders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_set(tmp_path / "train", 8, 1, False), write_set(tmp_path / "test", 20, 2, False)
    (one,) = json.loads(run(tmp_path, capsys, encoders[0], "--per-class", 6, "--json")[1])["scores"]
    words = (encoders[0], "--per-class", 6, "--json", "--classifier", "prototypes")
    (same,) = json.loads(run(tmp_path, capsys, *words)[1])["scores"]
    assert one["prototypes"] == [draw["accuracy"] for draw in same["draws"]]


def test_differences_are_taken_value_by_value() -> None:
    def score(name: str, values: list[float]) -> Score:
        return Score(name, np.array([values]), {}, {})

    base, better = score("a", [0.50, 0.60, 0.70]), score("b", [0.52, 0.61, 0.73])
    ((mean, interval),) = against_first((base, better))
    assert mean == pytest.approx(0.02)
    half = 4.30265273 * 0.01 / 3**0.5  # Student's quantile with two degrees of freedom
    assert (interval.low, interval.high) == pytest.approx((0.02 - half, 0.02 + half))
    assert as_table("accuracy", (base, better)).endswith("+2.00 (-0.48 to +4.48, inside the noise)")


def test_counted_scores_have_wilsons_interval_and_one_for_what_was_not_seen() -> None:
    perfect, same = (Score(name, np.ones((3, 20)), {}, {}, counted=True) for name in "ab")
    assert perfect.interval == Interval(wilson(20, 20).low, 1.0)
    ((mean, interval),) = against_first((perfect, same))
    assert mean == 0.0 and interval.low < -0.1 and interval.high > 0.1
    sure = [Score(name, np.ones((3, 20)), {}, {}) for name in "ab"]
    assert against_first(sure) == [(0.0, Interval(0.0, 0.0))]


def test_what_does_not_go_together_is_one_line(
    encoders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_set(tmp_path / "train", 6, 1, True), write_set(tmp_path / "test", 2, 2, True)
    code, _, err = run(tmp_path, capsys, encoders[0])
    assert code == 2 and "expected 50 images of every class, found 6 of blue; set --per-class" in err
    code, _, err = run(tmp_path, capsys, encoders[0], "--per-class", 6)
    assert code == 2 and "6 a class are all there are of" in err and "set --draws 1" in err
    code, _, err = run(tmp_path, capsys, encoders[0], "--per-class", 5, test="train")
    assert code == 2 and "found 18 in both (first: " in err
    (tmp_path / "test" / "violet").mkdir()
    (tmp_path / "test" / "violet" / "0.png").write_bytes(b"")
    code, _, err = run(tmp_path, capsys, encoders[0], "--per-class", 6)
    assert code == 2 and "expected the 3 classes of" in err and "violet is in one alone" in err
    (tmp_path / "train" / "violet").mkdir()
    for n in range(6):
        (tmp_path / "train" / "violet" / f"{n}.png").write_bytes((tmp_path / "train" / "red" / "0.png").read_bytes())
    code, _, err = run(tmp_path, capsys, encoders[0], "--per-class", 6, "--draws", 1)
    assert code == 2 and f"{tmp_path / 'test' / 'violet' / '0.png'}: not an image that can be read" in err
    code, _, err = run(tmp_path, capsys, encoders[0], tmp_path / "nowhere", "--per-class", 5)
    assert code == 2 and "nowhere" in err and len(err.strip().splitlines()) == 1
