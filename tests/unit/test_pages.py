"""The pages of evolve, compare and the probes: whole by themselves, with the numbers of the JSON, and names as they are."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pivot_megatron.config.load import decoded
from pivot_megatron.config.schema import Encoder
from pivot_megatron.data.sample import Pair
from pivot_megatron.probe.align import AlignmentReport, AlignmentSettings
from pivot_megatron.probe.classes import LinearReport, LinearSettings
from pivot_megatron.probe.gradcam_page import SHOWN, gradcam_page
from pivot_megatron.probe.gradcam_report import Column, GradcamReport, GradcamSettings, Seen, figure_name
from pivot_megatron.probe.interval import Interval
from pivot_megatron.probe.pages import alignment_page, linear_page
from pivot_megatron.probe.patch_grid import Box, PatchGrid
from pivot_megatron.probe.questions import Question
from pivot_megatron.probe.table import Score
from pivot_megatron.recipe import evolution_page as evolution
from pivot_megatron.recipe import run_facts
from pivot_megatron.recipe.answers_page import SHOWN_A_TASK, examples_section
from pivot_megatron.recipe.comparison import Measured, as_json
from pivot_megatron.recipe.comparison_page import comparison_page
from pivot_megatron.recipe.comparison_runs import examples_told
from pivot_megatron.recipe.evolution import PhaseResult, Probed
from pivot_megatron.recipe.held_out import HeldOut
from pivot_megatron.recipe.schedule import LinearProbe, PhaseSpec, Schedule
from pivot_megatron.report.charts import Series, line_chart
from pivot_megatron.report.facts import short_names, together, told
from pivot_megatron.report.interval_chart import IntervalLine, Titles, interval_chart
from pivot_megatron.report.intervals import (
    INSIDE,
    UNKNOWN,
    Line,
    Row,
    change_row,
    interval_table,
    verdict,
    verdicts_told,
)
from pivot_megatron.report.page import Fold, Page, Table, write_page
from tests.html_page import Page as Parsed
from tests.html_page import whole_page
from tests.unit.test_config import VALID

VERSIONS = {"torch": "2.13.0+cpu"}
ODD = 'runs/<b>&"x"</b>'


def parsed(page: Page, folder: Path) -> Parsed:
    write_page(page, folder / "report.html")
    found = whole_page(folder / "report.html")
    assert ODD not in (folder / "report.html").read_text()
    return found


def signed(share: float) -> str:
    return f"{100 * share:+.2f}".replace("-", "\u2212")


def scores(*names: str, draws: int = 3, columns: Any = None, record: Any = None) -> tuple[Score, ...]:
    draw = np.random.default_rng(0)
    shifts = (0.0, 0.1, 0.001, -0.15)
    base = draw.uniform(0.3, 0.7, (draws, 200))
    return tuple(
        Score(name, base + shift + draw.normal(0, 0.05, base.shape), columns or {"C on test": "61.25"}, record or {})
        for name, shift in zip(names, shifts)
    )


def shows(page: Parsed, records: dict[str, Any]) -> None:
    """Every mean, difference and interval of a JSON's scores."""
    for score in records["scores"]:
        low, high = (100 * score["interval"][end] for end in ("low", "high"))
        assert f"{100 * score['mean']:.2f} {low:.2f} to {high:.2f}" in page.text
    for one in records["against_the_first"]:
        low, high = (signed(one["interval"][end]) for end in ("low", "high"))
        assert f"{signed(one['difference'])} {low} to {high}" in page.text


def test_the_linear_probes_page_has_the_numbers_of_its_json(tmp_path: Path) -> None:
    settings = LinearSettings(Path("sets/train"), Path("sets/test"))
    report = LinearReport(settings, 12, 200, scores("runs/base", ODD, "runs/same", "runs/worse"))
    page = parsed(linear_page(report, VERSIONS), tmp_path)
    shows(page, json.loads(report.as_json()))
    assert page.text.count(INSIDE) == 3  # where it is explained, in the difference's row and in the table
    assert "2 of the 3 differences from base lie outside the noise." in page.text
    assert "61.25" in page.text and "sets/train" in page.text and "2.13.0+cpu" in page.text and '<b>&"x"' in page.text


def test_one_encoder_has_no_differences(tmp_path: Path) -> None:
    for draws in (3, 1):
        report = LinearReport(LinearSettings(Path("a"), Path("b"), draws=draws), 12, 200, scores(ODD, draws=draws))
        page = parsed(linear_page(report, VERSIONS), tmp_path)
        shows(page, json.loads(report.as_json()))
        assert f"accuracy {100 * report.scores[0].mean:.2f} % (95 % interval " in page.text
        assert "differences from" not in page.text and f"the mean of {draws} draw" in page.text


def test_two_encoders_are_told_in_words(tmp_path: Path) -> None:
    report = LinearReport(LinearSettings(Path("a"), Path("b")), 12, 200, scores("runs/one/encoder", "runs/two/encoder"))
    page = parsed(linear_page(report, VERSIONS), tmp_path)
    assert re.search(
        r"two against one: \+\d+\.\d\d points \(95 % interval .*?\), higher by more than the noise\.", page.text
    )


def test_the_alignments_page_shows_chance(tmp_path: Path) -> None:
    settings = AlignmentSettings(Path("llm"), Path("captions"), count=201, neighbours=10)
    report = AlignmentReport(settings, scores("base", ODD, draws=1, columns={"layers": "4, 1", "CKA": "0.214"}))
    page = parsed(alignment_page(report, VERSIONS), tmp_path)
    shows(page, json.loads(report.as_json()))
    assert "chance: 5.00" in page.text and "4, 1 0.214" in page.text and report.chance == 0.05


def gradcam(folder: Path, boxes: int, without: int) -> GradcamReport:
    grid, box = PatchGrid(4, 4, 8.0, 8.0), Box(0.0, 0.0, 16.0, 16.0)
    pair = Pair("key", b"", "what is <i>it</i>?", "a red circle", "a square", {})
    draw = np.random.default_rng(1)
    questions, seen = [], []
    for number in range(boxes + without):
        one = box if number < boxes else None
        questions.append(Question(f"line {number + 1}", pair, b"", (32, 32), one))
        seen.append(Seen(draw.random((4, 4)), grid, (0.6931, 0.5), grid.cover(one) if one else None))
        (folder / figure_name(number)).write_bytes(b"\x89PNG %d" % number)
    columns = [Column("runs/base", tuple(seen)), Column(ODD, tuple(reversed(seen)) if not without else tuple(seen))]
    return GradcamReport(GradcamSettings(Path("samples.jsonl")), questions, columns, folder)


def test_gradcams_page_holds_figures_answers_and_scores(tmp_path: Path) -> None:
    report = gradcam(tmp_path, 3, 1)
    page = parsed(gradcam_page(report, VERSIONS), tmp_path)
    assert [base64.b64decode(one.split(",")[1]) for one in page.addresses] == [b"\x89PNG %d" % n for n in range(4)]
    found = json.loads(report.as_json())
    assert page.text.count("what is <i>it</i>?") == page.text.count("chosen a red circle rejected a square") == 4
    for sample in found["samples"][:3]:
        for seen in sample["seen"]:
            where = "inside" if seen["pointing"] else "outside"
            assert f"0.6931 \u2192 0.5000 {100 * seen['energy']:.2f} 25.00 {where}" in page.text
    for score in found["scores"]:
        assert f"{100 * score['mean']:.2f}" in page.text
    assert "falls on 4 images, and how much of it in the boxes of 3." in page.text


def test_gradcams_page_of_one_box_none_and_many(tmp_path: Path) -> None:
    one = parsed(gradcam_page(gradcam(tmp_path, 1, 0), VERSIONS), tmp_path)
    assert UNKNOWN in one.text and "a single value without an interval" in one.text and "inf" not in one.text
    none = parsed(gradcam_page(gradcam(tmp_path, 0, 2), VERSIONS), tmp_path)
    assert "falls on 2 images." in none.text and "Energy" not in none.text and len(none.addresses) == 2
    many = parsed(gradcam_page(gradcam(tmp_path, 0, SHOWN + 2), VERSIONS), tmp_path)
    assert len(many.addresses) == SHOWN and f"The first {SHOWN} of {SHOWN + 2}; the others" in many.text


def evolved(folder: Path, monkeypatch: pytest.MonkeyPatch, *results: PhaseResult) -> Page:
    """Of runs with two steps each. How a run trains is told as its folder's name."""
    monkeypatch.setattr(evolution, "run_told", lambda config: f"told of {config.out.name}")
    monkeypatch.setattr(run_facts, "run_settings", lambda config: {"seed": 1, "data.shards.0.folder": config.out.name})
    phases = []
    for n, result in enumerate(results):
        run = folder / f"run-{n}"
        run.mkdir()
        margins = {"reward_margin": 0.0625} if result.objective == "dpo" else {}
        lines = [{"step": step, "loss": 1.5 / step, **margins} for step in (1, 2)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (run / "environment.json").write_text(json.dumps({"git": f"commit{n}", "packages": {"torch": "2.13.0+cpu"}}))
        phases.append(SimpleNamespace(name=result.name, config=SimpleNamespace(out=run)))
    specs = tuple(PhaseSpec(name=result.name, run={}) for result in results)
    probe = LinearProbe(train=Path("train"), test=Path("test"))
    schedule = Schedule(name="<b>growth</b>", out=folder, encoder=Encoder(hf=Path("base")), phases=specs, probe=probe)
    return evolution.evolution_page(schedule, phases, results)  # type: ignore[arg-type]


def phase(name: str, objective: str, probed: Probed | None) -> PhaseResult:
    margin = 0.125 if objective == "dpo" else None
    return PhaseResult(name, objective, "qwen2 64", True, 2, 24, 90.0, 0.6875, margin, probed and "encoder", probed)


LEARNT = Probed(0.7, Interval(0.65, 0.75), 0.1, Interval(0.06, 0.14))
MOVED = Probed(0.71, Interval(0.66, 0.76), 0.01, Interval(-0.02, 0.04))


def test_an_evolutions_page_has_each_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = [phase("<b>", "sft", LEARNT), phase("align", "sft", None), phase("dpo", "dpo", MOVED)]
    page = parsed(evolved(tmp_path, monkeypatch, *results), tmp_path)
    assert page.words.count("<b>") == 5  # accuracy, difference, table, curve, settings
    assert (
        "2 keys key <b> align dpo seed 1 1 1 data.shards.0.folder run-0 run-1 run-2" in page.text
        and "details" in page.tags
    )
    assert "70.00 65.00 to 75.00" in page.text and "71.00 66.00 to 76.00" in page.text
    assert "+10.00 +6.00 to +14.00 higher" in page.text
    assert f"+1.00 \u22122.00 to +4.00 {INSIDE}" in page.text
    assert "began at 60.00 %, and phase dpo left it at 71.00 % (95 % interval 66.00 to 76.00)." in page.text
    assert "the encoder as it began: 60.00" in page.text and "encoder as it was, bit for bit" in page.text
    assert page.text.count("1.5 \u2192 0.75") == 3 and page.text.count("0.0625 \u2192 0.0625") == 1
    assert "commit0 / commit1 / commit2" in page.text and page.text.count("2.13.0+cpu") == 1
    assert "phase dpo told of run-2" in page.text and "each phase left it, by logistic regression." in page.text


def test_an_evolution_without_a_probe_has_curves_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = parsed(evolved(tmp_path, monkeypatch, phase("align", "sft", None)), tmp_path)
    assert "No encoder was probed." in page.text and "Accuracy" not in page.text and "1.5 \u2192 0.75" in page.text


def test_a_runs_settings_are_all_there_is_to_decide() -> None:
    """What `run_told` leaves out with it: data and how much of them, frozen rules, decay, clipping, seed."""
    tree = VALID | {"data": {"shards": [{"folder": "mmpr", "most": 500}, "other"]}}
    config = decoded(tree | {"optimizer": {"learning_rate": 1e-6, "weight_decay": 0.25}}, "x")
    found = run_facts.run_settings(config)
    wanted = {"data.shards.0.folder": "mmpr", "data.shards.0.most": 500, "data.shards.1.most": None, "seed": 777}
    wanted |= {"parameters.0.match": "encoder.*", "parameters.0.rate": "frozen", "optimizer.weight_decay": 0.25}
    wanted |= {"optimizer.clip_gradient": 1.0, "objective.losses.sigmoid": 1, "model.encoder.hf": "e"}
    assert wanted.items() <= found.items() and not {"name", "out"} & found.keys()
    assert json.loads(json.dumps(found)) == found
    (fold,) = run_facts.settings_section({"<b>": [config, replace(config, seed=778)]}).parts
    assert isinstance(fold, Fold) and isinstance(fold.parts[0], Table)
    rows = dict(fold.parts[0].rows)
    assert rows["seed"] == "777 / 778" and rows["data.shards.1.most"] == "null" and rows["key"] == "<b>"


def test_answers_stand_beside_one_another_marked(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(file, "PNG")
    pairs = [HeldOut("scene", file.getvalue(), f"what {n}?", "It is red.", "It is not.", "red") for n in range(5)]
    texts = {"start": ["a <b>blue</b> one"] * 5, "dpo": ["red"] * 5}
    section = examples_section(pairs, texts)
    page = parsed(Page("t", "l", [section], {}, {}), tmp_path)
    shown = "question what 2? chosen It is red. start a <b>blue</b> one wrong dpo red right"
    assert shown in page.text and "what 3?" not in page.text and len(page.addresses) == SHOWN_A_TASK == 3
    told = examples_told(pairs, texts)
    assert [one["question"] for one in told] == ["what 0?", "what 1?", "what 2?"]
    assert (
        told[0]["answers"]["start"] == {"text": "a <b>blue</b> one", "right": False}
        and told[0]["answers"]["dpo"]["right"]
    )


def compared(count: int | None, measure: str = "encoder's accuracy") -> Measured:
    start, *others = scores("start", "dpo", ODD, "sft")
    seeds = [replace(one, record={"seeds": one.values.mean(axis=1).tolist()}, columns={}) for one in others]
    return Measured(count, measure, (replace(start, columns={}), *seeds))


def test_a_comparisons_page_of_one_count(tmp_path: Path) -> None:
    found = [compared(None)]
    page = parsed(comparison_page(found, [1, 2, 3], {"seeds": "1, 2, 3"}, VERSIONS), tmp_path)
    (told,) = json.loads(as_json({}, found))["measured"]
    for score in told["against_the_start"]["scores"][1:]:
        low, high = (100 * score["interval"][end] for end in ("low", "high"))
        seeds = " ".join(f"{100 * seed:.2f}" for seed in score["seeds"])
        assert f"{100 * score['mean']:.2f} {low:.2f} to {high:.2f} {seeds}" in page.text
    shows(page, {**told["against_the_first_variant"], "scores": []})
    start = told["against_the_start"]["scores"][0]
    assert f"what all began from: {100 * start['mean']:.2f}" in page.text
    assert "data efficiency" not in page.text and "Encoder's accuracy: differences from dpo" in page.text


def test_a_comparison_of_two_measures_one_without_a_start(tmp_path: Path) -> None:
    answers = compared(None, "answers right")
    measured = [compared(None), replace(answers, scores=answers.scores[1:])]
    page = parsed(comparison_page(measured, [1, 2, 3], {}, VERSIONS), tmp_path)
    assert "Answers right: differences from dpo" in page.text and "Encoder's accuracy: table" in page.text
    assert page.text.count("what all began from:") == 1 and "of the 4 differences from dpo" in page.text
    assert json.loads(as_json({}, measured))["measured"][1]["against_the_start"] is None


def test_a_comparisons_page_of_several_counts_has_their_curve(tmp_path: Path) -> None:
    page = parsed(comparison_page([compared(n) for n in (20000, 1000)], [1, 2, 3], {}, VERSIONS), tmp_path)
    assert "Encoder's accuracy: data efficiency" in page.text and "samples, logarithmic" in page.text
    assert page.text.count("what all began from:") == 1  # it is the same at both
    source = (tmp_path / "report.html").read_text()
    assert source.count('class="line bar-end"') == 2 * 3 and source.count("<circle") == 2 * 3


def test_verdicts_and_what_is_said_of_them() -> None:
    assert [verdict(1.0, *ends) for ends in ((0.5, 1.5), (-0.1, 2.0), (-math.inf, math.inf))] == [
        "higher",
        INSIDE,
        UNKNOWN,
    ]
    assert verdict(-1.0, -1.5, -0.5) == "lower"
    better, same = change_row("", "x", 0.02, 0.01, 0.03), change_row("", "y", 0.0, -0.01, 0.01)
    assert (better.value, better.low, better.high, better.cells) == (2.0, 1.0, 3.0, ["higher"])
    assert verdicts_told([], "a") == ""
    assert verdicts_told([same], "a") == f"y against a: +0.00 points (95 % interval \u22121.00 to +1.00), {INSIDE}."
    assert "None of the 2 differences from a lies outside" in verdicts_told([same, same], "a")
    assert "1 of the 2 differences from a lies outside" in verdicts_told([same, better], "a")
    assert "Each of the 2 differences from a lies outside" in verdicts_told([better, better], "a")


@pytest.mark.parametrize(
    ("ends", "zero", "line", "scale"),
    [
        ((73.1, 81.3), False, None, (70.0, 85.0)),
        ((0.1, 1.7), True, None, (0.0, 2.0)),
        ((-1.2, 1.5), True, None, (-2.0, 2.0)),
        ((73.1, 81.3), False, 62.1, (60.0, 85.0)),
        ((50.0, 50.0), False, None, (49.0, 51.0)),
        ((-math.inf, math.inf), True, None, (0.0, 60.0)),
    ],
)
def test_a_scale_reaches_around_all_there_is(ends: Any, zero: bool, line: float | None, scale: Any) -> None:
    value = 50.0 if math.isinf(ends[0]) else sum(ends) / 2
    lines = None if line is None else {"": Line("start", line)}
    found = interval_table([Row("", "x", 0, value, *ends)], [], zero=zero, lines=lines)
    assert (found.scale.low, found.scale.high) == pytest.approx(scale)


def test_an_interval_chart_keeps_its_scale() -> None:
    lines = [
        IntervalLine("a", [(1000, 50.0, 40.0, 60.0), (10000, 70.0, 65.0, 75.0)], 1),
        IntervalLine("<b>", [(1000, 45.0, -math.inf, math.inf), (10000, 55.0, 50.0, 60.0)], 2),
    ]
    svg = interval_chart(lines, Titles("<chart>", "samples & more", "accuracy"), 52.0)
    assert "inf" not in svg and "&lt;chart&gt;" in svg and "samples &amp; more, logarithmic" in svg
    dots = [tuple(map(float, one)) for one in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)]
    assert svg.count("bar-end") == 3 and len(dots) == 4
    ys = [y for _, y in dots]
    per_percent = (ys[0] - ys[1]) / 20
    assert per_percent > 0 and ys[2] - ys[0] == pytest.approx(5 * per_percent, abs=0.2)
    (level,) = re.findall(r'class="level" [^>]*y1="([\d.]+)"', svg)
    assert ys[0] - float(level) == pytest.approx(2 * per_percent, abs=0.2)
    bars = re.findall(r'bar-end" [^>]*d="M[\d.]+ ([\d.]+)L[\d.]+ ([\d.]+)', svg)
    for (low, high), y, (below, above) in zip(bars, (ys[0], ys[1], ys[3]), ((10, 10), (5, 5), (5, 5))):
        assert float(low) - y == pytest.approx(below * per_percent, abs=0.2)
        assert y - float(high) == pytest.approx(above * per_percent, abs=0.2)
    assert dots[2][0] - dots[0][0] == pytest.approx(5.0, abs=0.2)  # set apart
    assert "logarithmic" not in interval_chart(
        [IntervalLine("a", [(1, 0.5, 0.4, 0.6), (2, 0.6, 0.5, 0.7)], 0)], Titles("", "", "")
    )


def test_a_long_line_is_drawn_from_evenly_chosen_points() -> None:
    svg = line_chart([Series("loss", [(n, float(n)) for n in range(100_000)], 0)], title="loss")
    assert len(svg) < 100_000
    (faint, _) = re.findall(r'd="M([^"]+)"', svg)
    assert faint.startswith("46.0 174.0L") and faint.endswith("L350.0 10.0")


def test_short_names() -> None:
    assert short_names(["runs/a/encoder", "runs/b/c/encoder"]) == ["a", "b/c"]
    assert short_names(["/x/runs/a/encoder", "base"]) == ["/x/runs/a/encoder", "base"]
    assert short_names(["a/b", "a"]) == ["a/b", "a"]
    assert short_names(["/far/away/run/encoder"]) == ["run/encoder"]
    assert short_names(["runs/a", "runs/a"]) == ["runs/a", "runs/a"]


def test_facts() -> None:
    found = told({"feature_layer": None, "projected": True, "rate": 1e-05, "seeds": (1, 2), "out": Path("runs/x")})
    assert list(found.values()) == ["default", "yes", "1e-05", "1, 2", "runs/x"] and "feature layer" in found
    assert together([{"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"}]) == {"a": "1", "b": "2 / 3", "c": "4"}
