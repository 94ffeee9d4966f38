"""`pivot probe vqa`: lmms-eval's results to the paper's table, by hand; what is missing; what is not lmms-eval's."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pivot_megatron.cli import main
from pivot_megatron.config.shipped import shipped_config
from pivot_megatron.errors import UserError
from pivot_megatron.probe.benchmarks import read_suite
from pivot_megatron.probe.vqa import change
from pivot_megatron.probe.vqa_results import Result, read_model
from pivot_megatron.train import tracking
from tests.html_page import whole_page
from tests.trackers import Fake

ROOT = Path(__file__).parents[2]
# As lmms-eval 0.7.3 writes them: every metric of a task with its standard errors, those that it does not take as text.
TASKS: dict[str, dict[str, Any]] = {
    "mme": {"mme_perception_score,none": 1200.0, "mme_cognition_score,none": 300.0},
    "mmbench_en_dev": {"gpt_eval_score,none": 61.5, "submission,none": None},
    "seedbench": {"seed_image,none": 0.655, "seed_all,none": 0.6, "seed_video,none": 0.4},
    "gqa": {"exact_match,none": 0.6, "exact_match_stderr,none": 0.004},
    "scienceqa_img": {"exact_match,none": 0.7, "exact_match_stderr,none": 0.01},
    "mmmu_val": {"mmmu_acc,none": 0.35, "mmmu_acc_pass_at_k,none": [], "mmmu_acc_pass_at_k_stderr,none": []},
    "mathvista_testmini_format": {"llm_as_judge_eval,none": 31.0, "submission,none": [], "submission_stderr,none": []},
    "ai2d": {"exact_match,flexible-extract": 0.6, "exact_match_stderr,flexible-extract": 0.009},
    "chartqa": {
        "relaxed_overall,none": 0.5,
        "relaxed_overall_stderr,none": 0.01,
        "relaxed_augmented_split,none": 0.7,
        "relaxed_human_split,none": 0.3,
    },
    "ocrbench": {"ocrbench_accuracy,none": 0.4},
    "textvqa_val": {"exact_match,none": 0.45, "exact_match_stderr,none": 0.007, "submission,none": None},
    "docvqa_val": {"anls,none": 0.55, "anls_stderr,none": 0.006},
    "mmvp": {"mmvp_accuracy,none": 0.6, "mmvp_pair_accuracy,none": 0.3},
    "realworldqa": {"exact_match,none": 0.5, "exact_match_stderr,none": 0.018},
    "cv_bench_2d": {"cv_bench_acc,none": 0.52},
    "cv_bench_3d": {"cv_bench_acc,none": 0.58},
}
GROUPS = {
    "General": (60.0 + 61.5 + 65.5 + 60.0) / 4,
    "Knowledge": (70.0 + 35.0 + 31.0 + 60.0) / 4,
    "OCR & Chart": (50.0 + 40.0 + 45.0 + 55.0) / 4,
    "Vision-centric": (30.0 + 50.0 + 52.0 + 58.0) / 4,
}


def tree_of(model: str, tasks: dict[str, dict[str, Any]] = TASKS, **config: Any) -> dict[str, Any]:
    results = {}
    for task, metrics in tasks.items():
        results[task] = {"alias": task}
        for key, value in metrics.items():
            metric, kept_by = key.split(",")
            results[task] |= {key: value}
            if "_stderr" not in metric:
                for kind in ("stderr", "stderr_clt", "stderr_clustered"):
                    results[task].setdefault(
                        f"{metric}_{kind},{kept_by}", metrics.get(f"{metric}_{kind},{kept_by}", "N/A")
                    )
    ran = config.get("limit")
    return {
        "results": results,
        "group_subtasks": {task: [] for task in tasks},
        "configs": {task: {"task": task} for task in tasks},
        "versions": dict.fromkeys(tasks, "Yaml"),
        "n-samples": {task: {"original": 1000, "effective": ran or 1000} for task in tasks},
        "config": {"model": "llava_hf", "model_args": f"pretrained={model}", "limit": None, "offset": 0, **config},
        "lmms_eval_version": "unknown@unknown",
        "model_source": "llava_hf",
        "model_name": model,
        "model_name_sanitized": model.replace("/", "__"),
    }


def written(path: Path, tree: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, indent=2))
    return path


def with_metric(task: str, key: str, value: Any) -> dict[str, Any]:
    tasks = copy.deepcopy(TASKS)
    tasks[task][key] = value
    return tasks


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes into `runs/` by default goes nowhere else."""
    monkeypatch.chdir(tmp_path)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["probe", "vqa", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_scores_and_averages_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, written(tmp_path / "a_results.json", tree_of("runs/a")), "--json")
    found = json.loads(out)
    (model,) = found["models"]
    assert code == 0 and (model["model"], model["missing"], model["other_tasks"]) == ("runs/a", {}, [])
    assert model["groups"] == pytest.approx(GROUPS)
    assert model["average"] == pytest.approx(sum(GROUPS.values()) / 4)
    scores = {name: one["score"] for name, one in model["scores"].items()}
    assert len(scores) == 16 and scores["MME-P"] == pytest.approx(1200 / 20)
    assert (scores["MMBench"], scores["SEED-image"]) == pytest.approx((61.5, 65.5))
    assert (scores["MathVista"], scores["OCRBench"], scores["MMVP"]) == pytest.approx((31.0, 40.0, 30.0))
    stderrs = {name: one["stderr"] for name, one in model["scores"].items() if one["stderr"] is not None}
    assert stderrs == pytest.approx(
        {
            "GQA": 0.4,
            "ScienceQA-img": 1.0,
            "AI2D": 0.9,
            "ChartQA": 1.0,
            "TextVQA": 0.7,
            "DocVQA": 0.6,
            "RealWorldQA": 1.8,
        }
    )


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    better = with_metric("gqa", "exact_match,none", 0.63)
    better["mme"]["mme_perception_score,none"] = 1240.0
    base = written(tmp_path / "a_results.json", tree_of("base"))
    other = written(tmp_path / "b_results.json", tree_of("pivot", better))
    code, out, _ = run(capsys, base, other)
    rows = {line.split("  ")[0]: line.split()[1:] for line in out.splitlines() if line and not line.startswith("  ")}
    rows |= {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith("  ")}
    half = 1.959963984540054 * (0.4**2 + 0.4**2) ** 0.5
    assert code == 0
    assert rows["GQA"] == ["60.00", "63.00", "+3.00", f"({3 - half:+.2f}", "to", f"{3 + half:+.2f})"]
    assert rows["MME-P"] == ["60.00", "62.00", "+2.00"]  # no standard error, so no interval
    assert rows["AI2D"][2:] == ["+0.00", "(-2.49", "to", "+2.49,", "inside", "the", "noise)"]
    assert rows["General"] == ["61.75", "63.00", "+1.25"] and rows["average"] == ["51.44", "51.75", "+0.31"]
    assert rows["SigLIP2-So/16"] == ["52.4", "54.6", "55.6"] and "MISSING" not in out
    _, out, _ = run(capsys, base, other, "--markdown")
    assert out.splitlines()[:2] == ["|  | base | pivot | against the first |", "| --- | ---: | ---: | ---: |"]
    assert "| MME-P | 60.00 | 62.00 | +2.00 |" in out.splitlines()


def test_the_page_and_the_file_have_what_the_table_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake()
    monkeypatch.setattr(tracking, "_opened", lambda _: [fake])
    monkeypatch.setattr("pivot_megatron.train.tracking.require_trackers", lambda _: None)
    base = written(tmp_path / "a_results.json", tree_of("<b>base</b>"))
    other = written(tmp_path / "b_results.json", tree_of("pivot", with_metric("gqa", "exact_match,none", 0.63)))
    code, _, _ = run(capsys, base, other, "--out", "told", "--tensorboard")
    found, page = (
        json.loads((tmp_path / "told" / "vqa.json").read_text()),
        whole_page(tmp_path / "told" / "report.html"),
    )
    assert code == 0 and found["settings"]["results"] == [str(base), str(other)] and "torch" in found["versions"]
    half = 1.959963984540054 * 0.4
    assert f"GQA <b>base</b> 60.00 {60 - half:.2f} to {60 + half:.2f} pivot 63.00" in page.text
    assert f"+3.00 +{3 - half * 2**0.5:.2f} to +{3 + half * 2**0.5:.2f} higher" in page.text
    assert "MME-P pivot +0.00 none no interval" in page.text and "SigLIP2-So/16 52.4 54.6 55.6" in page.text
    assert "Average of the groups: <b>base</b> 51.44 %; pivot 51.62 %." in page.text and "torch" in page.text
    figures = fake.calls[0][1]
    assert figures["vqa/GQA/pivot"] == 0.63 and figures["vqa/GQA/pivot_low"] == pytest.approx(0.63 - half / 100)
    assert figures["vqa/average/pivot"] == pytest.approx(0.5162, abs=1e-4) and "vqa/MME-P/pivot_low" not in figures
    part = written(tmp_path / "c_results.json", tree_of("part", {"gqa": TASKS["gqa"]}))
    run(capsys, part, "--out", "told")
    page = whole_page(tmp_path / "told" / "report.html")
    assert "part no average, for 15 of 16 benchmarks are missing" in page.text and "MISSING DocVQA of part" in page.text


def test_an_interval_takes_two_standard_errors() -> None:
    points, interval = change(Result(50.0, 3.0), Result(52.0, 4.0))
    assert interval is not None
    assert (points, interval.low, interval.high) == pytest.approx((2.0, 2 - 1.96 * 5, 2 + 1.96 * 5), abs=1e-3)
    assert change(Result(50.0, None), Result(52.0, 4.0)) == (2.0, None)


@pytest.mark.parametrize(
    ("tasks", "why"),
    [
        ({name: one for name, one in TASKS.items() if name != "docvqa_val"}, "not in the results"),
        (with_metric("docvqa_val", "anls,none", None), "null for a score"),
    ],
)
def test_a_missing_benchmark_is_named_and_no_average_passes_for_whole(
    tasks: dict[str, dict[str, Any]],
    why: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = written(tmp_path / "a_results.json", tree_of("base"))
    part = written(tmp_path / "b_results.json", tree_of("pivot", tasks | {"docvqa_test": {"submission,none": None}}))
    code, out, _ = run(capsys, whole, part)
    assert code == 0 and f"MISSING DocVQA of pivot: docvqa_val: {why}" in out.splitlines()
    assert "MISSING 1 of 16 of pivot: no average of their groups, and none of all" in out
    assert "not in the table, of pivot: docvqa_test" in out
    assert re.search(r"^  DocVQA +55\.00 +- +-$", out, re.M) and re.search(r"^OCR & Chart +47\.50 +- +-$", out, re.M)
    assert re.search(r"^average +51\.44 +- +-$", out, re.M) and re.search(
        r"^General +61\.75 +61\.75 +\+0\.00$", out, re.M
    )
    found = json.loads(run(capsys, part, whole, "--json")[1])
    assert found["models"][0]["average"] is None and found["models"][0]["groups"]["OCR & Chart"] is None
    assert "DocVQA" not in found["against_the_first"][0]["scores"]


def test_a_part_of_the_samples_is_no_result(tmp_path: Path) -> None:
    suite = read_suite(shipped_config("benchmarks.yaml"))
    limited = read_model(written(tmp_path / "a_results.json", tree_of("m", limit=8)), suite)
    assert len(limited.missing) == 16 and limited.overall(suite) is None
    assert limited.missing["GQA"] == "ran on 8 of 1000 samples; leave out --limit and --offset"
    shifted = read_model(written(tmp_path / "a_results.json", tree_of("m", offset=5)), suite)
    assert "from number 5 on" in shifted.missing["GQA"]
    assert not read_model(written(tmp_path / "a_results.json", tree_of("m", limit=1000)), suite).missing


def test_a_folder_is_one_model_in_several_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = list(TASKS)
    for file, part in (("1_results.json", names[:5]), ("2_results.json", names[5:])):
        written(tmp_path / "m" / file, tree_of("m", {name: TASKS[name] for name in part}))
    (tmp_path / "m" / "1_samples_gqa.jsonl").write_text("{}\n")
    code, out, _ = run(capsys, tmp_path / "m", "--json")
    assert code == 0 and json.loads(out)["models"][0]["average"] == pytest.approx(sum(GROUPS.values()) / 4)
    written(tmp_path / "m" / "3_results.json", tree_of("m", {"gqa": TASKS["gqa"]}))
    code, _, err = run(capsys, tmp_path / "m")
    assert code == 2 and "gqa: expected it once, found it in 1_results.json and 3_results.json" in err
    written(tmp_path / "m" / "3_results.json", tree_of("n", {"gqa": TASKS["gqa"]}))
    code, _, err = run(capsys, tmp_path / "m")
    assert code == 2 and "expected results of one model, found m and n" in err
    (tmp_path / "none").mkdir()
    code, _, err = run(capsys, tmp_path / "none")
    assert code == 2 and "expected *_results.json, found none" in err


@pytest.mark.parametrize(
    ("tree", "line"),
    [
        ([], "expected lmms-eval's results"),
        ({"overall_acc": 0.5}, "expected lmms-eval's results"),
        ({"results": {"gqa": 0.5}}, "expected lmms-eval's results"),
        (
            tree_of("m", {"pope": {"pope_accuracy,none": 0.8}}),
            "expected tasks such as ai2d, chartqa, cv_bench_2d, found pope",
        ),
        (
            tree_of("m", TASKS | {"mmmu_val": {"acc,none": 0.3, "acc_stderr,none": 0.1, "top,none": 0.3}}),
            "mmmu_val: expected the metric mmmu_acc,none, found acc,none and top,none; where this lmms-eval",
        ),
        (tree_of("m", with_metric("gqa", "exact_match,none", 61.2)), "expected a number from 0 to 1, found 61.2"),
        (
            tree_of("m", with_metric("mme", "mme_perception_score,none", -1)),
            "expected a number from 0 to 2000, found -1",
        ),
        (tree_of("m", with_metric("gqa", "exact_match,none", "N/A")), "expected a number from 0 to 1, found 'N/A'"),
        (tree_of("m", with_metric("gqa", "exact_match,none", True)), "expected a number from 0 to 1, found True"),
    ],
)
def test_what_is_not_such_a_file_is_one_line(
    tree: Any, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, written(tmp_path / "a_results.json", tree))
    assert code == 2 and not out and line in err and str(tmp_path) in err and len(err.strip().splitlines()) == 1


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, tmp_path / "none.json")
    assert code == 2 and "none.json: cannot be read (No such file or directory)" in err
    (tmp_path / "cut.json").write_text('{"results": {')
    code, _, err = run(capsys, tmp_path / "cut.json")
    assert code == 2 and "cut.json: not JSON: " in err


def test_models_of_one_name_are_told_apart_by_their_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [written(tmp_path / f"{n}_results.json", tree_of("same")) for n in "ab"]
    found = json.loads(run(capsys, *files, "--json")[1])
    assert [model["model"] for model in found["models"]] == list(map(str, files))


def test_another_release_is_a_file_over_the_shipped_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Such as MMBench without a judge."""
    over = {"base": str(shipped_config("benchmarks.yaml"))}
    over |= {"groups": {"General": {"MMBench": {"task": "mmbench_en_dev_static"}}}}  # type: ignore[dict-item]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(over))
    tasks = {name.replace("mmbench_en_dev", "mmbench_en_dev_static"): one for name, one in TASKS.items()}
    file = written(tmp_path / "a_results.json", tree_of("m", tasks))
    assert "MISSING MMBench of m: mmbench_en_dev: not in the results" in run(capsys, file)[1]
    assert "MISSING" not in run(capsys, file, "--benchmarks", tmp_path / "mine.yaml")[1]


@pytest.mark.parametrize(
    ("tree", "line"),
    [
        ({"groups": {}}, "lmms_eval: "),
        ({"lmms_eval": "1", "groups": {}}, "expected groups with a benchmark in each"),
        ({"lmms_eval": "1", "groups": {"G": {}}}, "expected groups with a benchmark in each"),
        ({"lmms_eval": "1", "groups": {"G": {"A": {"task": "a", "metric": "m,none"}}}}, "groups.G.A.full: "),
        ({"lmms_eval": "1", "groups": {"G": {"A": {"task": "a", "metric": "m,none", "full": 0}}}}, "A: full: expected"),
        (
            {
                "lmms_eval": "1",
                "groups": {group: {"A": {"task": "a", "metric": "m,none", "full": 1}} for group in "GH"},
            },
            "expected A in one group, found it in 2",
        ),
    ],
)
def test_a_wrong_list_of_benchmarks_is_named(tree: dict[str, Any], line: str, tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=re.escape(line)):
        read_suite(tmp_path / "b.yaml")


def test_the_shipped_list_is_the_papers_and_the_page_has_its_tasks() -> None:
    suite = read_suite(shipped_config("benchmarks.yaml"))
    assert {group: list(names) for group, names in suite.groups.items()} == {
        "General": ["MME-P", "MMBench", "SEED-image", "GQA"],
        "Knowledge": ["ScienceQA-img", "MMMU", "MathVista", "AI2D"],
        "OCR & Chart": ["ChartQA", "OCRBench", "TextVQA", "DocVQA"],
        "Vision-centric": ["MMVP", "RealWorldQA", "CV-Bench-2D", "CV-Bench-3D"],
    }
    page = (ROOT / "docs" / "vqa.md").read_text(encoding="utf-8")
    (tasks,) = re.findall(r"^TASKS=(\S+)$", page, re.M)
    assert tasks.split(",") == [one.task for one in suite.benchmarks.values()]
    assert f"lmms-eval=={suite.lmms_eval}" in page
    for name, one in suite.benchmarks.items():
        assert re.search(rf"^\|[^|]*\| {name} \| `{one.task}` \| `{one.metric}` \| {one.full:g} \|", page, re.M), name


def test_the_documented_file_is_read_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where docs/vqa.md has it, beside the shipped one."""
    told = (ROOT / "docs" / "vqa.md").read_text()
    name = re.search(r"`configs/(\w+\.yaml)`: MMBench", told)
    text = re.search(r"```yaml\n(.*?)```", told, re.DOTALL)
    assert name and text
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "benchmarks.yaml").write_text(shipped_config("benchmarks.yaml").read_text())
    (tmp_path / "configs" / name[1]).write_text(text[1])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = read_suite(Path("../configs") / name[1]).benchmarks
    shipped = read_suite(shipped_config("benchmarks.yaml")).benchmarks
    assert found == shipped | {"MMBench": dataclasses.replace(shipped["MMBench"], task="mmbench_en_dev_static")}
