"""What `pivot bench layouts` makes of runs: which layouts fit, what rounds come to, what is printed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from markupsafe import escape

from pivot_megatron.bench.layout_cases import Case, Misfit, cases_of_files, cases_of_processes, sorted_out
from pivot_megatron.bench.layout_job import Job, RankFound
from pivot_megatron.bench.layout_page import layouts_page, write_plot
from pivot_megatron.bench.layout_report import as_json, as_text
from pivot_megatron.bench.layout_runs import Amount, LayoutRun, Step, _last_words, steps_of
from pivot_megatron.bench.layout_summary import summaries, summarise
from pivot_megatron.bench.layouts import LayoutBench, in_turn
from pivot_megatron.bench.spread import Spread
from pivot_megatron.bench.step_regions import SHARES
from pivot_megatron.cli import main
from pivot_megatron.config.load import load_config
from pivot_megatron.config.schema import Layout
from pivot_megatron.errors import UserError
from pivot_megatron.plan.prediction import Prediction
from pivot_megatron.report.page import write_page
from tests.dist.runs import config_tree, make_world, write_config

GIB = 2**30
AMOUNT = Amount(rounds=2, warm_up=1, timed=2, divided=1, repeat=False)


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = make_world(tmp_path_factory.mktemp("layouts"), pairs=4)
    return write_config(world / "run.yaml", config_tree(world, world / "out"))


def case(run_yaml: Path, name: str = "one", **layout: int) -> Case:
    return Case(name, replace(load_config(run_yaml), layout=Layout(**layout)), data_parallel=1)


def a_run(seconds: Sequence[float], rate: float = 10.0, ranks: Sequence[RankFound] = ()) -> LayoutRun:
    """Steps of 4 pairs, 100 tokens and 20 operations."""
    whole = {"head": 6.0, "communication": 2.0}
    found = tuple(ranks) or (RankFound(0, 0, 3 * GIB, whole),)
    return LayoutRun(tuple(Step(s, s / 10, pairs=4, tokens=100, flops=20.0, rate=rate) for s in seconds), found)


def bench(cases: Sequence[Case], runs: dict[str, list[LayoutRun]]) -> LayoutBench:
    misfits = [Misfit("tp8", ("layout.tensor: <8> heads", "and more"))]
    return LayoutBench("shape tiny", 2, AMOUNT, 10.0, 7.5, cases, runs, {"tp4": "OutOfMemoryError"}, misfits, {})


def test_every_way_to_divide_the_processes_is_looked_at(run_yaml: Path) -> None:
    names = [name for name, _ in cases_of_processes(run_yaml, 4, [])]
    assert names == [
        *("tp1_pp1_dp4", "tp2_pp1_dp2", "tp4_pp1_dp1"),
        *("tp1_pp2_dp2", "tp1_pp2_vpp2_dp2", "tp2_pp2_dp1", "tp2_pp2_vpp2_dp1"),
        *("tp1_pp4_dp1", "tp1_pp4_vpp2_dp1"),
    ]


def test_those_that_do_not_fit_are_told_apart_with_the_reason(run_yaml: Path) -> None:
    """The model has two layers and four heads."""
    cases, others = sorted_out(cases_of_processes(run_yaml, 2, []), 2)
    assert [(one.name, one.data_parallel) for one in cases] == [
        *(("tp1_pp1_dp2", 2), ("tp2_pp1_dp1", 1), ("tp1_pp2_dp1", 1))
    ]
    (misfit,) = others
    assert misfit.name == "tp1_pp2_vpp2_dp1"
    assert "a stage's 1 LLM layers do not divide by virtual_pipeline 2" in misfit.why[0]


def test_files_are_laid_over_the_run_and_overrides_over_both(run_yaml: Path, tmp_path: Path) -> None:
    wide = write_config(tmp_path / "wide.yaml", {"layout": {"tensor": 2, "overlap_gradient_reduce": True}})
    deep = write_config(tmp_path / "deep.yaml", {"layout": {"pipeline": 4}, "batch": {"micro_tokens": 64}})
    found = cases_of_files(run_yaml, [wide, deep], ["seed=5"])
    assert [(name, config.layout, config.seed) for name, config in found] == [
        ("wide", Layout(tensor=2, overlap_gradient_reduce=True), 5),
        ("deep", Layout(pipeline=4), 5),
    ]
    assert found[1][1].batch.micro_tokens == 64
    cases, others = sorted_out(found, 2)
    assert [one.name for one in cases] == ["wide"]
    assert others == [Misfit("deep", ("layout: tensor 1 x pipeline 4 does not divide 2 processes",))]


def test_none_that_fits_is_an_error_with_every_reason(run_yaml: Path, tmp_path: Path) -> None:
    file = write_config(tmp_path / "tp3.yaml", {"layout": {"tensor": 3}})
    with pytest.raises(UserError, match="no layout fits 3 processes") as error:
        sorted_out(cases_of_files(run_yaml, [file], []), 3)
    assert "tp3: layout.tensor: encoder heads (4)" in str(error.value)


def test_layouts_take_turns_to_and_fro(run_yaml: Path) -> None:
    cases = [case(run_yaml, name) for name in "ABC"]
    order = ["".join(one.name for one in in_turn(cases, number)) for number in range(3)]
    assert order == ["ABC", "CBA", "ABC"]


def test_rounds_come_to_medians_and_spreads(run_yaml: Path) -> None:
    runs = [a_run([1.0, 3.0]), a_run([1.0, 1.0]), a_run([8.0, 8.0])]
    found = summarise(case(run_yaml), runs, gemm_peak=10.0)
    assert found.step_seconds == Spread(1.0, 2.0, 8.0)
    assert found.pairs_a_second == Spread(0.5, 2.0, 4.0)
    assert found.tokens_a_second == Spread(12.5, 50.0, 100.0)
    assert found.flops_a_second == Spread(2.5, 10.0, 20.0)
    assert found.mfu == Spread(0.25, 1.0, 2.0)
    assert found.shares == {**dict.fromkeys(SHARES, 0.0), "head": 0.75, "communication": 0.25}
    assert (found.quiet, found.steps) == (True, (6, 6))


def test_disturbed_steps_are_left_out_and_told_of(run_yaml: Path) -> None:
    found = summarise(case(run_yaml), [a_run([1.0]), a_run([9.0], rate=7.9)], gemm_peak=10.0)
    assert (found.step_seconds, found.quiet, found.steps) == (Spread(1.0, 1.0, 1.0), True, (1, 2))
    mixed = a_run([1.0, 9.0])
    mixed = replace(mixed, steps=(mixed.steps[0], replace(mixed.steps[1], rate=7.9)))
    found = summarise(case(run_yaml), [mixed, a_run([3.0])], gemm_peak=10.0)
    assert (found.step_seconds, found.quiet, found.steps) == (Spread(1.0, 2.0, 3.0), True, (2, 3))
    found = summarise(case(run_yaml), [a_run([1.0], rate=1.0), a_run([9.0], rate=7.9)], gemm_peak=10.0)
    assert (found.step_seconds, found.quiet, found.steps) == (Spread(1.0, 5.0, 9.0), False, (2, 2))


def test_looks_at_the_machine_are_no_part_of_the_steps_between_them() -> None:
    """Two ranks: what they multiply at together, and the lower of before and after."""
    lines = [
        {"step_seconds": seconds, "data_seconds": 0.5, "pairs": 4, "tokens": 100, "flops": 20.0}
        for seconds in (2.0, 3.0)
    ]
    ranks = [
        RankFound(0, 0, GIB, rates=(5.0, 3.0, 4.0), looked=(0.25, 0.75, 0.1)),
        RankFound(1, 0, GIB, rates=(5.0, 4.0, 4.0), looked=(9.0, 9.0, 9.0)),
    ]
    assert steps_of(lines, ranks) == (Step(1.75, 0.25, 4, 100, 20.0, 7.0), Step(2.25, 0.0, 4, 100, 20.0, 7.0))
    assert LayoutRun((), tuple(ranks)).fastest == 10.0


def test_a_plans_step_at_the_pace_of_the_steps_beside_it(run_yaml: Path) -> None:
    found = summarise(case(run_yaml), [a_run([2.0], rate=9.0)], 10.0, prediction(1.5, 3.0), calibrated=12.0)
    assert found.pace == pytest.approx(0.75)
    assert (found.step_off, found.step_off_at_pace) == (pytest.approx(-0.25), pytest.approx(0.0))


def test_memory_and_shares_are_by_stage(run_yaml: Path) -> None:
    first = [
        *(RankFound(0, 0, 5, {"encoder": 1.0, "idle": 1.0}), RankFound(1, 0, 7, {"encoder": 2.0})),
        *(RankFound(2, 1, 3, {"head": 4.0}), RankFound(3, 1, 2, {"idle": 4.0})),
    ]
    found = summarise(case(run_yaml, pipeline=2), [a_run([1.0], ranks=first)], gemm_peak=10.0)
    assert found.peak_bytes == (7, 3)
    zeros = dict.fromkeys(SHARES, 0.0)
    assert found.stage_shares == ({**zeros, "encoder": 0.75, "idle": 0.25}, {**zeros, "head": 0.5, "idle": 0.5})
    assert found.shares == {**zeros, "encoder": 0.25, "idle": 5 / 12, "head": 1 / 3}


@pytest.fixture
def found(run_yaml: Path) -> LayoutBench:
    slow, fast = case(run_yaml, "slow"), case(run_yaml, "fast", pipeline=2)
    ranks = [RankFound(0, 0, 2 * GIB, {"encoder": 1.0}), RankFound(1, 1, GIB, {"head": 1.0, "idle": 2.0})]
    never = case(run_yaml, "tp4")
    return bench(
        [slow, fast, never], {"slow": [a_run([2.0])], "fast": [a_run([1.0], ranks=ranks, rate=5.0)], "tp4": []}
    )


def prediction(seconds: float, *gib: float) -> Prediction:
    return Prediction(Layout(), 1, seconds, {}, 0.0, [int(one * GIB) for one in gib])


def test_predictions_stand_beside_what_was_measured(found: LayoutBench) -> None:
    fast, slow = summaries(replace(found, predicted={"fast": prediction(1.25, 1.5, 1.0)}))
    assert (fast.name, slow.name) == ("fast", "slow")
    assert (fast.step_off, fast.peak_off) == (0.25, -0.25)
    assert (slow.predicted, slow.step_off, slow.peak_off) == (None, None, None)
    text = as_text(found, [fast, slow])
    assert "fast    1       1.25       +25%    1.00  1.25     +25%    2.00      1.50       -25%" in text
    assert "The plan's prediction" not in as_text(found, summaries(found))


def test_text_has_every_layout_once_a_table(found: LayoutBench) -> None:
    lines = [" ".join(line.split()) for line in as_text(found, summaries(found)).splitlines()]
    assert lines[0].startswith("shape tiny, processes: 2; rounds: 2, timed steps in each: 2, data as in training")
    assert "the reference pass, 7.5 s once, is no part of the steps" in lines[0]
    assert "fast 4 [4, 4] 100 1 2e-11 200.0% 2.00 1.00 1 of 1, busy" in lines
    assert "slow 2 [2, 2] 50 2 1e-11 100.0% 3.00 1 of 1" in lines
    assert "stage 1 0.0% 0.0% 33.3% 0.0% 0.0% 66.7% 0.0%" in lines
    assert "tp4 failed: OutOfMemoryError" in lines
    assert "tp8 layout.tensor: <8> heads; and more" in lines


def test_json_is_complete(found: LayoutBench) -> None:
    tree = json.loads(as_json(found, summaries(replace(found, predicted={"fast": prediction(1.25, 1.5)}))))
    fast, slow = tree["layouts"]
    assert fast["predicted"]["step_seconds"] == 1.25
    assert (fast["step_off"], slow["predicted"]) == (0.25, None)
    assert slow["runs"][0]["steps"][0] == {
        "seconds": 2.0,
        "data_seconds": 0.2,
        "pairs": 4,
        "tokens": 100,
        "flops": 20.0,
        "rate": 10.0,
    }
    assert (tree["gemm_peak"], tree["reference_seconds"]) == (10.0, 7.5)
    assert tree["failed"] == {"tp4": "OutOfMemoryError"}


def test_picture_and_page(found: LayoutBench, tmp_path: Path) -> None:
    layouts = summaries(found)
    write_plot(layouts, tmp_path / "layouts.png")
    png = (tmp_path / "layouts.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    write_page(layouts_page(found, layouts, png, {"rounds": "2"}, {"torch": "1"}), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert str(escape("layout.tensor: <8> heads")) in page
    assert "<8>" not in page
    assert "data:image/png;base64," in page


def test_a_job_makes_no_last_step(tmp_path: Path) -> None:
    job = Job("run.yaml", 2, 5, 3, repeat=True)
    assert (job.steps, job.run_steps) == (10, 11)
    job.write(tmp_path / "job.json")
    assert Job.read(tmp_path / "job.json") == job


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("step 1\nTraceback\nOutOfMemoryError: none left\n  of 80 GiB\n", "OutOfMemoryError: none left"),
        ("step 1\npivot: layout.tensor: must divide\n\n", "layout.tensor: must divide"),
        ("", "ended with 3"),
    ],
)
def test_a_failure_is_told_in_one_line(said: str, told: str) -> None:
    assert _last_words(said, 3) == told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--shape", "tiny", "--rounds", "0"], "expected --rounds >= 1 and --steps >= 1, found 0 and 5"),
        (["--shape", "tiny", "--processes", "0"], "expected --processes of 1 or more, found 0"),
        (["--shape", "huge"], "--shape: expected one of"),
        ([], "expected a run's YAML or --shape, found neither"),
        (["no.yaml"], "no.yaml: no such file"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert main(["bench", "layouts", "--out", str(tmp_path / "b"), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_a_folder_with_files_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("")
    assert main(["bench", "layouts", "--shape", "tiny", "--out", str(tmp_path)]) == 2
    assert "already has files in it" in capsys.readouterr().err


def test_a_layout_named_twice_is_refused(run_yaml: Path, tmp_path: Path) -> None:
    file = write_config(tmp_path / "tp2.yaml", {"layout": {"tensor": 2}})
    with pytest.raises(UserError, match="files of different names, found tp2 more than once"):
        cases_of_files(run_yaml, [file, file], [])
