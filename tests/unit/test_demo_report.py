"""The demo's report: of the probes' own reports, with their statistic, and every part of it on the page."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pivot_megatron.config.schema import Tracking
from pivot_megatron.data.sample import Pair
from pivot_megatron.probe.classes import LinearReport, LinearSettings
from pivot_megatron.probe.gradcam_report import Column, GradcamReport, GradcamSettings, Seen, figure_name
from pivot_megatron.probe.interval import wilson
from pivot_megatron.probe.patch_grid import PatchGrid
from pivot_megatron.probe.questions import Question
from pivot_megatron.probe.segment import SegmentationReport, SegmentationSettings
from pivot_megatron.probe.table import Score
from pivot_megatron.recipe import demo_page, demo_phases
from pivot_megatron.recipe.demo import run_demo
from pivot_megatron.recipe.demo_folder import Demo
from pivot_megatron.recipe.demo_report import DemoReport
from pivot_megatron.recipe.demo_scale import DemoScale
from pivot_megatron.recipe.export_checks import ExportCheck
from pivot_megatron.recipe.held_out import HeldOut
from pivot_megatron.recipe.small_tasks import Answered, TaskReport, TaskSettings
from pivot_megatron.report.intervals import INSIDE
from pivot_megatron.report.page import write_page
from tests.html_page import Page, whole_page

QUESTIONS = 900
CURVES = {
    "pretrain": {"loss": [(1, 5.25), (2, 4.125)]},
    "dpo": {"loss": [(1, 0.75), (2, 0.5)], "chosen_rewards": [(1, 0.0), (2, 0.25)], "rejected_rewards": [(1, 0.0)]},
}


def png(color: str, size: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), color).save(file, "PNG")
    return file.getvalue()


def answered(model: str, right: int) -> Answered:
    """`right` answers from the first on, and as many pairs."""
    texts = ["It is red."] * right + ["It is <b>blue</b>."] * (QUESTIONS - right)
    return Answered(model, tuple(texts), ((-1.0, -2.0),) * right + ((-2.0, -1.0),) * (QUESTIONS - right))


def scores(names: str, draws: int = 2) -> tuple[Score, ...]:
    draw = np.random.default_rng(0)
    base = draw.integers(0, 2, (draws, 200)).astype(float)
    own = [np.where(draw.random(base.shape) < 0.1, 1 - base, base) for _ in names.split()]
    return tuple(
        Score(name, values, {"prototypes": f"{n}1.25"}, {}, counted=True)
        for n, (name, values) in enumerate(zip(names.split(), own, strict=True), 3)
    )


def gradients(folder: Path) -> GradcamReport:
    pair = Pair("key", b"", "Which <i>kind</i>?", "a circle", "a square", {})
    grid = PatchGrid(4, 4, 2.0, 2.0)
    for number in range(2):
        (folder / figure_name(number)).write_bytes(png(("orange", "purple")[number], 4))
    seen = tuple(Seen(np.eye(4), grid, (0.6931, 0.25), None) for _ in range(2))
    questions = [Question(f"pair {n}", pair, b"", (8, 8), None) for n in range(2)]
    columns = [Column(name, seen) for name in ("base", "sft", "dpo")]
    return GradcamReport(GradcamSettings(Path("held_out"), 2), questions, columns, folder)


@pytest.fixture
def report(tmp_path: Path) -> DemoReport:
    tasks = ("text", "chart", "scene")
    pairs = tuple(HeldOut(tasks[n % 3], png("red"), "Which?", "It is red.", "No.", "red") for n in range(QUESTIONS))
    encoders = "base sft dpo init"
    return DemoReport(
        answers=TaskReport(
            TaskSettings(Path("held_out")), pairs, (answered("base", 300), answered("sft", 306), answered("dpo", 325))
        ),
        blind=Score("blind", np.array([[1.0] * 90 + [0.0] * 810]), {}, {}, counted=True),
        labels={
            name: LinearReport(LinearSettings(Path(name, "train"), Path(name, "test")), 12, 200, scores(encoders))
            for name in ("scenes", "digits")
        },
        masks=SegmentationReport(
            SegmentationSettings(Path("masks/train"), Path("masks/test"), 5),
            40,
            20,
            (0, 1, 2),
            (),
            scores(encoders, draws=3),
            Image.new("RGB", (16, 8), "green"),
        ),
        gradients=gradients(tmp_path),
        exports=[ExportCheck("dpo encoder", "export/dpo/encoder", False, 4.8e-7, 3, 51)],
        seconds={"pretrain": 261.5, "dpo": 62.5},
    )


def page_of(report: DemoReport, folder: Path) -> Page:
    write_page(
        demo_page.demo_page(report, CURVES, {"seed": "777 <own>"}, {"torch": "2.13.0+cpu"}), folder / "report.html"
    )
    return whole_page(folder / "report.html")


def test_differences_are_those_that_the_probes_tell(report: DemoReport) -> None:
    found = {(one.measure, one.model, one.against): one for one in report.changes()}
    told = {
        "answers": json.loads(report.answers.as_json())["answers"],
        "preferences": json.loads(report.answers.as_json())["preferences"],
        "scenes": json.loads(report.labels["scenes"].as_json()),
        "digits": json.loads(report.labels["digits"].as_json()),
        "masks": json.loads(report.masks.as_json()),
    }
    for measure, records in told.items():
        for record in records["against_the_first"][:2]:
            one = found[measure, record["encoder"], "base"]
            assert one.value == record["difference"] and one.interval.as_record() == record["interval"]
    assert len(found) == 2 * 3 + 3 * 4


def test_a_difference_on_the_same_samples_is_seen(report: DemoReport) -> None:
    """306 and 325 of the same 900, none lost: the two intervals overlap, and the difference is no noise."""
    assert wilson(306, QUESTIONS).high > wilson(325, QUESTIONS).low
    (one,) = (one for one in report.changes() if (one.measure, one.model, one.against) == ("answers", "dpo", "sft"))
    assert one.interval.low > 0.0 and one.value == pytest.approx(19 / QUESTIONS)


def test_the_page_has_every_measure_of_every_model(report: DemoReport, tmp_path: Path) -> None:
    text = page_of(report, tmp_path).text
    for scores_ in report.measures().values():
        for score in scores_:
            assert f"{100 * score.mean:.1f} [{100 * score.shown.low:.1f}, {100 * score.shown.high:.1f}]" in text
            if score.encoder != "blind":
                ends = f"{100 * score.shown.low:.2f} to {100 * score.shown.high:.2f}"
                assert f"{score.encoder} {100 * score.mean:.2f} {ends} {' '.join(score.columns.values())}" in text
    for one in report.changes():
        ends = (one.value, one.interval.low, one.interval.high)
        value, low, high = (f"{100 * end:+.2f}".replace("-", "\u2212") for end in ends)
        assert f"{one.model} \u2212 {one.against} {value} {low} to {high}" in text
    assert "95 % interval prototypes" in text and "of the 5 differences from sft" in text and INSIDE in text


def test_the_page_has_every_part(report: DemoReport, tmp_path: Path) -> None:
    page = page_of(report, tmp_path)
    for title in (
        "All measures",
        "Differences",
        "Answers: answers right",
        "Answers: pairs ranked right",
        "Answers: examples",
        "Linear probe of scenes: accuracy",
        "Linear probe of digits: accuracy",
        "Segmentation: macro recall",
        "Segmentation: maps",
        "Grad-CAM: samples",
        "Training",
        "Exports",
        "Time",
        "Settings",
        "Versions",
    ):
        assert f" {title} " in f" {page.text} ", title
    pictures = [base64.b64decode(one.split(",")[1]) for one in page.addresses]
    assert pictures.count(png("red")) == 9  # three questions of each task
    assert {png("orange", 4), png("purple", 4)} <= set(pictures) and len(pictures) == 9 + 1 + 2
    told = "base It is red. right sft It is red. right dpo It is red. right"
    assert page.text.count(told) == 9 and "Which <i>kind</i>?" in page.text
    assert page.text.count("0.6931 \u2192 0.2500") == 2 * 3
    assert "5.25 \u2192 4.125" in page.text and "chosen_rewards 0 \u2192 0.25 rejected_rewards 0 \u2192 0" in page.text
    assert "export/dpo/encoder no 4.8e-07 51 3" in page.text
    assert "pretrain 4 min 22 s dpo 62.5 s" in page.text and "took 5 min 24 s" in page.text
    assert "777 <own>" in page.text and "2.13.0+cpu" in page.text and "Linear probe of scenes: draws 3" in page.text


def test_a_wrong_answer_is_marked(report: DemoReport, tmp_path: Path) -> None:
    base, *others = report.answers.answered
    wrong = replace(base, texts=("It is <b>blue</b>.",) * QUESTIONS)
    text = page_of(replace(report, answers=replace(report.answers, answered=(wrong, *others))), tmp_path).text
    assert text.count("base It is <b>blue</b>. wrong sft It is red. right") == 9


def test_the_terminals_table(report: DemoReport) -> None:
    models, changes, exports = (part.splitlines() for part in report.as_text().split("\n\n"))
    assert models[0].split() == ["answers", "preferences", "scenes", "digits", "masks"]
    assert [line.split()[0] for line in models[1:]] == ["blind", "init", "base", "sft", "dpo"]
    assert models[1].split() == ["blind", "10.0", "[8.0,", "12.1]"] and "36.1 [33.0, 39.3]" in models[-1]
    assert len(changes) == 18 and changes[0].split()[:4] == ["answers", "sft", "-", "base"]
    assert "DOES NOT LOAD" in exports[0] and "51 tensors changed, 3 unchanged" in exports[0]
    assert max(map(len, models)) <= 110


def test_the_json_holds_each_probes_own(report: DemoReport) -> None:
    found = json.loads(report.as_json(settings={"seed": "777"}, versions={"torch": "2"}))
    assert found["linear"]["digits"] == json.loads(report.labels["digits"].as_json())
    assert found["answers"]["models"][2]["texts"][-1] == "It is <b>blue</b>."
    assert found["gradcam"]["samples"][1]["figure"] == "0002.png" and len(found["segmentation"]["scores"]) == 4
    assert found["differences"][0]["interval"].keys() == {"low", "high"} and found["blind"]["mean"] == 0.1
    assert found["exports"][0]["max_difference"] == 4.8e-7 and found["seconds"]["dpo"] == 62.5
    assert found["table"] == report.as_text() and found["versions"] == {"torch": "2"}


def test_a_finished_demo_works_again_for_trackers_alone(
    report: DemoReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[Any] = []
    worked: list[Demo] = []

    def work(demo: Demo) -> DemoReport:
        worked.append(demo)
        return report

    monkeypatch.setattr(demo_phases, "work", work)
    monkeypatch.setattr(demo_page, "setting_facts", lambda demo: {"seed": "777"})
    monkeypatch.setattr(demo_page, "environment_facts", lambda run: {"torch": "2"})
    monkeypatch.setattr(demo_page, "curves", lambda runs: CURVES)
    monkeypatch.setattr(demo_page, "track", lambda *given: told.append(given))
    out = tmp_path / "demo"
    for tracking in (Tracking(), Tracking(), Tracking("offline")):
        run_demo(out, 1, tracking, DemoScale.smallest())
        assert capsys.readouterr().out.startswith(report.as_text())
    assert len(worked) == len(told) == 2
    title, tracking, file, page, table, figures = told[-1]
    assert tracking.wandb == "offline" and file == out / "report.html" and file.exists() and page.title == title
    assert table == report.as_text() and figures == report.figures()


def test_trackers_are_told_figures_by_measure(report: DemoReport) -> None:
    found = report.figures()
    assert found["answers/dpo"] == pytest.approx(325 / QUESTIONS) and "pairs/sft-base_low" in found
    assert found["scenes/accuracy/init"] == report.labels["scenes"].scores[3].mean and "digits/accuracy/dpo" in found
    assert "macro_recall/dpo-base" in found
