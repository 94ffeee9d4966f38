"""Reports to trackers: what they are told, when, and what wandb and TensorBoard make of it."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pivot_megatron.cli import main
from pivot_megatron.config.schema import Tracking
from pivot_megatron.probe.interval import Interval
from pivot_megatron.probe.table import Score, figures
from pivot_megatron.recipe.comparison import Measured, figures_of
from pivot_megatron.recipe.evolution import PhaseResult, Probed
from pivot_megatron.recipe.evolution import figures as evolution_figures
from pivot_megatron.report.page import Page
from pivot_megatron.report.tracked import track
from pivot_megatron.train import tracker, tracking
from tests.trackers import Fake, events, needs_tensorboard, needs_wandb, single, wandb_history
from tests.unit.test_probe_linear import encoders, write_set  # noqa: F401  (a fixture)

PAGE = Page("Title", "Lead.", [], {"draws": "3"}, {"torch": "2"})


def test_a_report_is_told_where_asked_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes: list[Fake] = []
    subjects: list[tracker.Subject] = []

    def opened(subject: tracker.Subject) -> list[Fake]:
        subjects.append(subject)
        fakes.append(Fake(held=len(fakes)))
        return fakes[-1:]

    monkeypatch.setattr(tracking, "_opened", opened)
    page = tmp_path / "report.html"
    track("mine", Tracking(), page, PAGE, "a table", {"a/b": 0.5})
    assert not fakes and not list(tmp_path.iterdir())
    for value in (0.5, 0.5, 0.75):
        track("mine", Tracking("offline"), page, PAGE, "a table", {"a/b": value})
    told = [(n + 1, {"a/b": value, "table": "a table", "report": page}) for n, value in enumerate((0.5, 0.75))]
    assert [fake.calls for fake in fakes] == [[one, ("closed", False)] for one in told]
    lines = [json.loads(line) for line in (tmp_path / "reports.jsonl").read_text().splitlines()]
    assert lines == [{"step": n, "a/b": value, "table": "a table"} for n, value in ((1, 0.5), (2, 0.75))]
    assert [(one.name, one.folder, one.done) for one in subjects] == [("mine", tmp_path, 0), ("mine", tmp_path, 1)]
    described = {"settings": '{"draws": "3"}', "environment": '{"torch": "2"}'}
    assert subjects[0].described == described and subjects[0].lines == "reports.jsonl"


def test_a_tracker_that_lacks_reports_is_given_them_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without their pages, which are gone."""
    monkeypatch.setattr(tracking, "_opened", lambda _: [Fake()])
    track("mine", Tracking("offline"), tmp_path / "report.html", PAGE, "t", {"a": 1.0})
    late = Fake()
    monkeypatch.setattr(tracking, "_opened", lambda _: [late])
    track("mine", Tracking(tensorboard=True), tmp_path / "report.html", PAGE, "t", {"a": 2.0})
    assert [call[0] for call in late.calls] == [1, 2, "closed"]
    assert "report" not in late.calls[0][1] and late.calls[1][1]["report"] == tmp_path / "report.html"


def test_a_tracker_that_fails_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "_opened", lambda _: [Fake(fails=1)])
    track("mine", Tracking("offline"), tmp_path / "report.html", PAGE, "t", {"a": 1.0})
    assert "mine: tracking.fake: 1 of 1 lines were not taken; reports.jsonl has them" in capsys.readouterr().err


def test_figures_have_names_that_trackers_take() -> None:
    first, other = (Score(name, np.array([[a, 0.5]]), {}, {}) for name, a in (("runs/a b/x", 0.5), ("runs/c/x", 0.7)))
    found = figures("mutual neighbours", [first, other])
    name = "mutual_neighbours/c-a_b"
    half = 12.7062047364 * 0.1  # Student's quantile with one degree of freedom, by 0.2 / sqrt(2) / sqrt(2)
    assert found[name] == pytest.approx(0.1) and found["mutual_neighbours/a_b"] == 0.5
    assert (found[f"{name}_low"], found[f"{name}_high"]) == pytest.approx((0.1 - half, 0.1 + half))
    alone = figures("m", [Score("a", np.array([[0.5]]), {}, {})])
    assert alone == {"m/a": 0.5}  # measured once, without an interval


def test_a_comparisons_figures_have_count_and_measure() -> None:
    scores = [
        Score(name, np.full((2, 3), value), {}, {}) for name, value in (("start", 0.5), ("dpo", 0.6), ("sft", 0.4))
    ]
    found = figures_of(
        [Measured(None, "encoder's accuracy", tuple(scores)), Measured(500, "answers", tuple(scores[1:]))]
    )
    assert found["all_samples/encoder_s_accuracy/start"] == 0.5
    assert found["all_samples/encoder_s_accuracy/sft-start"] == pytest.approx(-0.1)
    assert found["all_samples/encoder_s_accuracy/sft-dpo"] == pytest.approx(-0.2)
    assert found["500_samples/answers/sft-dpo_high"] == pytest.approx(-0.2) and "500_samples/answers/start" not in found


def test_an_evolutions_figures_are_by_phase() -> None:
    probed = Probed(0.8, Interval(0.7, 0.9), 0.1, Interval(-math.inf, math.inf))
    one = PhaseResult("align", "sft", "qwen2 32", False, 5, 20, 1.0, 0.25, None, None, None)
    two = PhaseResult("dpo", "dpo", "qwen2 32", True, 6, 24, 1.0, 0.5, 0.125, "e", probed)
    assert evolution_figures([one, two]) == {
        **{"align/steps": 5, "align/pairs": 20, "align/loss": 0.25},
        **{"dpo/steps": 6, "dpo/pairs": 24, "dpo/loss": 0.5, "dpo/reward_margin": 0.125},
        **{"dpo/accuracy": 0.8, "dpo/accuracy_low": 0.7, "dpo/accuracy_high": 0.9, "dpo/difference": 0.1},
    }


def probe(tmp_path: Path, found: list[Path], *words: str) -> int:
    if not (tmp_path / "train").exists():
        write_set(tmp_path / "train", 8, 1, True), write_set(tmp_path / "test", 4, 2, True)
    sets = ["--train", str(tmp_path / "train"), "--test", str(tmp_path / "test"), "--out", str(tmp_path / "out")]
    return main(["probe", "linear", *map(str, found), *sets, "--per-class", "6", "--draws", "2", *words])


def told_of(out: Path) -> dict[str, float]:
    """What linear.json says of two encoders, under the names that a tracker has."""
    tree = json.loads((out / "linear.json").read_text())
    (change,) = tree["against_the_first"]
    rows: dict[str, Any] = {"accuracy/0": tree["scores"][0], "accuracy/1": tree["scores"][1], "accuracy/1-0": change}
    found = {}
    for name, row in rows.items():
        found[name] = row["difference" if name.endswith("-0") else "mean"]
        found |= {f"{name}_{end}": row["interval"][end] for end in ("low", "high")}
    return found


@pytest.fixture
def named(encoders: list[Path], tmp_path: Path) -> list[Path]:  # noqa: F811
    """Of names that differ in a digit."""
    for n, encoder in enumerate(encoders):
        (tmp_path / str(n)).symlink_to(encoder)
    return [tmp_path / "0", tmp_path / "1"]


@needs_wandb
def test_wandb_offline_has_a_probes_figures_and_page(named: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert probe(tmp_path, named, "--wandb", "offline", "--project", "vision") == 0
    assert probe(tmp_path, named, "--wandb", "offline", "--project", "vision") == 0  # which finds the same
    ((step, values),) = wandb_history(out)
    assert step == 1 and {name: values[name] for name in told_of(out)} == told_of(out)
    assert "against the first" in values["table"]
    assert values["report._type"] == "html-file"
    (page,) = out.glob("wandb/offline-run-*/files/media/html/*.html")
    assert page.read_text() == (out / "report.html").read_text()


@needs_tensorboard
def test_tensorboard_has_a_probes_figures_and_table(named: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert probe(tmp_path, named, "--tensorboard") == 0 and probe(tmp_path, named, "--tensorboard") == 0
    numbers, texts = events(out)
    assert numbers == {name: [(1, single(value))] for name, value in told_of(out).items()}
    assert texts["report"] == [(1, str(out / "report.html"))] and "against the first" in texts["table"][0][1]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--tensorboard"], "tracking.tensorboard: expected the package tensorboard, found none"),
        (["--wandb", "offline"], "tracking.wandb: expected the package wandb, found none"),
        (["--project", "a/b"], "--project: 1 to 128 characters"),
    ],
)
def test_what_cannot_be_told_is_said_before_any_work(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("wandb", "tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)
    assert probe(tmp_path, [tmp_path / "nowhere"], *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line and not (tmp_path / "out").exists()
