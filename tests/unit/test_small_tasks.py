"""`pivot probe answers`: greedy answers and preferences of models beside one another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from pivot_megatron.cli import main
from pivot_megatron.convert.commands import export_checkpoint, import_checkpoint
from pivot_megatron.data_prep.synthetic import write_conversations, write_pairs
from pivot_megatron.recipe.held_out import HeldOut
from pivot_megatron.recipe.small_tasks import Answered, TaskReport, TaskSettings
from tests.dist.runs import make_world
from tests.html_page import whole_page


def pair(task: str, label: str) -> HeldOut:
    return HeldOut(task, b"", "what?", f"It is {label}.", "It is not.", label)


def test_scores_by_hand() -> None:
    pairs = (pair("scene", "red"), pair("scene", "blue"), pair("text", "A"), pair("text", "B"))
    first = Answered("a", ("red", "a blue one", "a", "B"), ((-1.0, -2.0), (-2.0, -1.0), (-1.0, -1.0), (-1.0, -3.0)))
    second = Answered("b", ("red", "blue", "A", "B"), ((-1.0, -2.0),) * 4)
    report = TaskReport(TaskSettings(Path("x")), pairs, (first, second))
    answers, preferences = report.answers(), report.preferences()
    assert [score.mean for score in answers] == [0.75, 1.0]  # "a" is no letter A that was read
    assert [score.mean for score in preferences] == [0.5, 1.0]  # a tie is not ranked right
    assert answers[0].columns == {"scene": "100.00", "text": "50.00"}
    table = report.as_text().splitlines()
    assert table[0].split()[:6] == ["encoder", "answers", "95", "%", "interval", "scene"] and "+25.00 (" in table[2]
    assert json.loads(report.as_json())["models"][0]["texts"][1] == "a blue one"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = make_world(tmp_path / "world", pairs=4)
    write_pairs(tmp_path / "held_out", 6, seed=4, image_size=48, progress=False)
    import_checkpoint(world / "encoder", world / "llm", tmp_path / "checkpoint", None, seed=0)
    export_checkpoint(tmp_path / "checkpoint", "mllm", tmp_path / "mllm", "drop", None)
    options = ["--pairs", str(tmp_path / "held_out"), "--count", "4", "--out", str(tmp_path / "out")]

    def run(*models: Path, more: Sequence[str] = ()) -> int:
        return main(["probe", "answers", *map(str, models), *options, *more])

    assert run(tmp_path / "checkpoint", tmp_path / "mllm") == 0
    found = json.loads((tmp_path / "out" / "answers.json").read_text())
    one, same = found["models"]
    assert one["texts"] == same["texts"] and len(one["texts"]) == 4
    assert found["preferences"]["against_the_first"][0]["difference"] == 0.0
    page = whole_page(tmp_path / "out" / "report.html")
    assert one["texts"][0] in page.text and "pairs ranked right" in page.text.lower() and "torch" in page.text
    capsys.readouterr()
    assert run(world / "encoder") == 2 and "expected model_type llava" in capsys.readouterr().err
    assert run(tmp_path / "mllm", more=["--count", "0"]) == 2
    assert "expected pairs to ask of, found none" in capsys.readouterr().err
    write_conversations(tmp_path / "captions", 2, seed=1, image_size=48, kind="caption")
    assert run(tmp_path / "mllm", more=["--pairs", str(tmp_path / "captions")]) == 2
    assert "expected pairs with image, task and label" in capsys.readouterr().err
