import base64
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from pivot_megatron.errors import UserError
from pivot_megatron.probe.interval import wilson
from pivot_megatron.recipe.findings import comparisons, measures, pooled
from pivot_megatron.recipe.report import (
    AnswerScore,
    DemoReport,
    Example,
    ExportCheck,
    PreferenceScore,
    ProbeScore,
    terminal_table,
    write_html,
)
from pivot_megatron.report.charts import Series, line_chart, nice_ticks
from pivot_megatron.report.intervals import INSIDE
from tests.html_page import Page

PIXEL = base64.b64encode(b"\x89PNG not really").decode()


def probe(encoder: str, correct: int, total: int = 540) -> ProbeScore:
    interval = wilson(correct, total)
    return ProbeScore(encoder, "digits", correct / total, interval.low, interval.high, total, 0.316, 0.912)


REPORT = DemoReport(
    environment={"torch": "2.13.0+cpu"},
    settings={"beta": "0.1 <default>"},
    seconds={"pretrain": 61.5, "dpo": 3671.0},
    curves={
        "pretrain": {"loss": [(1, 5.25), (2, 4.125)], "learning_rate": [(1, 1e-3), (2, 5e-4)]},
        "dpo": {
            "loss": [(step, 0.693 / step) for step in range(1, 60)],
            "chosen_rewards": [(1, 0.0), (2, math.nan), (3, 0.25)],
            "rejected_rewards": [(1, 0.0), (2, -0.5), (3, -0.75)],
        },
    },
    answers=[
        AnswerScore("sft", "colour", 41, 100),
        AnswerScore("dpo", "colour", 87, 100),
        AnswerScore("sft", "count", 30, 100),
        AnswerScore("dpo", "count", 33, 100),
    ],
    preference=[PreferenceScore("sft", "colour", 55, 90, -0.125), PreferenceScore("dpo", "colour", 57, 90, 1.625)],
    probes=[probe("init", 400), probe("sft", 410), probe("dpo", 300)],
    examples=[Example("colour", PIXEL, "Which colour is <b>it</b>?", "Red", {"sft": "blue", "dpo": " red"}, ["dpo"])],
    exports=[ExportCheck("dpo", "out/export/dpo", False, 4.8e-7, 3, 51)],
)


def page(report: DemoReport, folder: Path) -> tuple[str, Page]:
    write_html(report, folder / "out" / "report.html")
    source = (folder / "out" / "report.html").read_text(encoding="utf-8")
    return source, Page(source)


def test_page_shows_every_number(tmp_path: Path) -> None:
    text = page(REPORT, tmp_path)[1].text
    counts = [(s.correct, s.total) for s in REPORT.answers] + [(s.correct, s.total) for s in REPORT.preference]
    for correct, total in counts:
        interval = wilson(correct, total)
        assert f"{correct}/{total}" in text
        assert f"{100 * correct / total:.1f}" in text
        assert f"{100 * interval.low:.1f} to {100 * interval.high:.1f}" in text
    for found in REPORT.probes:
        assert f"{100 * found.accuracy:.1f} {100 * found.low:.1f} to {100 * found.high:.1f} 540 0.316 91.2" in text
    assert "71/200" in text and "120/200" in text
    assert "\u22120.125" in text and "+1.625" in text
    assert "5.25 \u2192 4.125" in text and "0.25" in text
    assert "out/export/dpo no 4.8e-07 51 3" in text
    assert "61.5 s" in text and "1 h 1 min" in text
    assert "2.13.0+cpu" in text and "0.1 <default>" in text
    assert "Which colour is <b>it</b>?" in text and "red \u2713" in text and "blue \u2713" not in text


def test_page_fetches_nothing(tmp_path: Path) -> None:
    source, parsed = page(REPORT, tmp_path)
    assert parsed.addresses == [f"data:image/png;base64,{PIXEL}"]
    assert not parsed.tags & {"script", "link", "iframe", "object"}
    assert not re.search(r"https?:|//\w|url\(|@import", source)


def test_page_states_what_is_noise(tmp_path: Path) -> None:
    text = page(REPORT, tmp_path)[1].text
    assert "3 of the 5 differences between models lie outside the noise." in text
    # Once in the explanation, once for each of the other two.
    assert text.count(INSIDE) == 3
    one = replace(REPORT, answers=[], probes=[])
    assert "The one difference between models is inside the noise." in page(one, tmp_path)[1].text
    alike = replace(REPORT, answers=[], probes=[probe("a", 400), probe("b", 401)])
    assert "None of the 2 differences between models lies outside the noise" in page(alike, tmp_path)[1].text


def test_an_empty_report_is_a_page(tmp_path: Path) -> None:
    empty = DemoReport({}, {}, {}, {}, [], [], [], [], [])
    assert page(empty, tmp_path)[1].text == "PIVOT demo report PIVOT demo report"
    assert DemoReport.from_json(empty.to_json()).to_json() == empty.to_json()
    assert terminal_table(empty) == ""


def test_verdicts() -> None:
    verdicts = {(c.measure, c.first, c.second): c.verdict for m in measures(REPORT) for c in comparisons(m)}
    assert verdicts == {
        ("answer accuracy", "sft", "dpo"): "higher",
        ("preference accuracy", "sft", "dpo"): INSIDE,
        ("probe: digits", "init", "sft"): INSIDE,
        ("probe: digits", "init", "dpo"): "lower",
        ("probe: digits", "sft", "dpo"): "lower",
    }


def test_pooling_takes_the_tasks_that_all_models_share() -> None:
    scores = [AnswerScore("a", "x", 1, 2), AnswerScore("a", "y", 9, 9), AnswerScore("b", "x", 2, 4)]
    found = pooled(scores)
    assert {model: (one.value, one.total) for model, one in found.items()} == {"a": (0.5, 2), "b": (0.5, 4)}
    assert pooled([AnswerScore("a", "x", 1, 2), AnswerScore("b", "y", 1, 2)]) == {}


def test_terminal_table() -> None:
    lines = terminal_table(REPORT).splitlines()
    assert lines[0].split() == ["answer", "accuracy", "preference", "accuracy", "probe:", "digits"]
    assert [line.split()[0] for line in lines[1:4]] == ["init", "sft", "dpo"]
    assert lines[1].split()[1:4] == ["-", "-", "74.1"]
    assert "35.5 [29.2, 42.3]" in lines[2]
    assert "DOES NOT LOAD" in lines[-1] and "51 tensors changed, 3 unchanged" in lines[-1]
    assert max(map(len, lines)) <= 100


def test_json_round_trip() -> None:
    report = replace(REPORT, curves={"dpo": {"loss": [(1, 0.5)]}})
    text = json.dumps(report.to_json())
    assert DemoReport.from_json(json.loads(text)).to_json() == report.to_json()
    assert DemoReport.from_json(json.loads(text)).curves["dpo"]["loss"] == ((1, 0.5),)


def test_unknown_and_missing_fields_are_the_users_error() -> None:
    data = REPORT.to_json()
    data["probes"][1]["colour"] = data["probes"][1].pop("c")
    with pytest.raises(UserError, match=r"report\.probes\[1\].*missing \['c'\] and unknown \['colour'\]"):
        DemoReport.from_json(data)
    del data["curves"]
    with pytest.raises(UserError, match=r"report: .*missing \['curves'\]"):
        DemoReport.from_json(data)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-3, 17, [0, 5, 10, 15]), (1, 300, [100, 200, 300]), (2, 2, [2])],
)
def test_nice_ticks(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(ticks)


def test_line_chart_keeps_to_its_box_and_breaks_at_nan() -> None:
    svg = line_chart([Series("loss", [(1, 2.0), (2, 1.0), (3, math.nan), (4, 3.0), (5, 2.0)], 0)], title="<loss>")
    path = re.search(r'd="([^"]+)"', svg)
    assert path is not None and path[1].count("M") == 2 and "nan" not in svg and "&lt;loss&gt;" in svg
    corners = [tuple(map(float, pair)) for pair in re.findall(r"[ML]([\d.]+) ([\d.]+)", path[1])]
    assert corners[0] == (46, 92) and max(y for _, y in corners) == 174 and min(y for _, y in corners) == 10
    assert line_chart([Series("loss", [(1, math.nan)], 0)], title="loss") == ""
    assert "nan" not in line_chart([Series("flat", [(3, 1.0)], 0)], title="flat")
