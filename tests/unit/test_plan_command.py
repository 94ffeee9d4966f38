"""`pivot plan`, in process: on published sizes with no files, and on a small run with its data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from pivot_megatron.cli import main
from pivot_megatron.config.load import load_config
from pivot_megatron.config.schema import Layout
from pivot_megatron.convert.tiny_checkpoints import make_encoder, make_head, make_tokenizer
from pivot_megatron.data_prep.synthetic import write_pairs
from pivot_megatron.model.fit import misfits
from pivot_megatron.plan import commands
from pivot_megatron.plan.columns import aligned
from pivot_megatron.plan.dry_run import DryRun
from pivot_megatron.plan.hardware import gpu, known_architecture
from pivot_megatron.plan.machine import write_machine
from pivot_megatron.plan.rehearsal import Build, StageFound
from pivot_megatron.plan.scaling import against_ideal, scaling
from pivot_megatron.plan.stages import chunks
from pivot_megatron.plan.subject import planned
from pivot_megatron.plan.workload import Lengths
from tests.html_page import whole_page

RUN = "configs/run/2_dpo.yaml"
BASE = ("--encoder", "siglip2-base-patch16-384", "--head", "qwen2.5-0.5b", "--samples", "20000")


def ran(out: Path, *words: str) -> int:
    return main(["plan", RUN, *BASE, "--out", str(out), *words])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its model and its pairs."""
    world = tmp_path_factory.mktemp("world")
    sizes = {"image_size": 64, "patch_size": 8, "hidden_size": 32, "layers": 2, "heads": 2, "ffn": 64}
    make_encoder(world / "encoder", **sizes, seed=1)
    tokenizer = make_tokenizer(["What number is shown in the picture, and of which colour is it?"], 400)
    head = {"hidden_size": 64, "layers": 4, "heads": 4, "kv_heads": 2, "ffn": 96}
    make_head(world / "llm", tokenizer, **head, tied=True, seed=2)
    write_pairs(world / "pairs", 24, 7, 64)
    tree = {
        "name": "small",
        "out": str(world / "run"),
        "model": {"encoder": {"hf": str(world / "encoder")}, "llm": {"hf": str(world / "llm")}},
        "objective": {"kind": "dpo"},
        "data": {"shards": [str(world / "pairs")]},
        "optimizer": {"learning_rate": 1e-6},
        "batch": {"global_size": 8, "micro_tokens": 1024, "epochs": 2},
        "precision": {"compute": "bf16"},
    }
    path = world / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_published_sizes_need_no_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ran(tmp_path, "--top", "3", "--explain", "2") == 0
    out = capsys.readouterr().out
    assert "8 x NVIDIA H100 SXM, 8 a node" in out and "NVIDIA H100 Tensor Core GPU data sheet" in out
    assert (
        "assumed in hardware.yaml" in out
        and "234, 3 epochs of 20,000" in out
        and "loaders feed a device 720 images a second" in out
    )
    table = out.split("rank  tensor")[1].split("\n\n")[0].splitlines()[1:]
    assert len(table) == 3 and all("compute of" in line or "messages" in line for line in table)
    assert "Rank 2: tensor " in out and "Memory of a rank, GiB" in out
    tree = json.loads((tmp_path / "plan.json").read_text())
    assert tree["gpus"] == 8 and tree["layouts"][0]["rank"] == 1
    step = tree["layouts"][1]["step_seconds"]
    assert f"Step: {step * 1e3:,.2f} ms" in out
    assert (tmp_path / "plan.png").stat().st_size > 10_000 and not (tmp_path / "scaling.png").exists()
    page = whole_page(tmp_path / "report.html")
    assert "Time of the first" in page.text


def test_the_json_has_numbers_and_the_arithmetic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--layout", "own", "--explain", "--json", "precision.fp8=tensorwise"]
    assert ran(tmp_path, *words) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["machine"]["name"] == "NVIDIA H100 SXM" and tree["machine"]["devices_a_node"] == 8
    assert (tree["steps"], tree["epochs"], tree["epoch_samples"]) == (234, 3, 20000)
    assert tree["precision"]["fp8"]["recipe"] == "tensorwise"
    assert (tree["precision"]["mfu_dtype"], tree["precision"]["mfu_peak_flops"]) == ("fp8", 1978.9e12)
    assert tree["samples"]["branch_tokens"] == [200, 200] and tree["model"]["parameters"] > 5e8
    (layout,), explained = tree["layouts"], tree["explain"]
    assert explained["rank"] == 1 and explained["step_seconds"] == layout["step_seconds"]
    (memory,) = explained["memory"]
    assert {part: one["bytes"] for part, one in memory.items()} | {"total": 0} == layout["stages"][0]["memory"] | {
        "total": 0
    }
    assert "in FP8 x 2 bytes" in memory["copies"]["how"]
    passage = sum(op["seconds"] for op in explained["operations"])
    assert passage == pytest.approx(explained["micro_batch_seconds"])
    whole = explained["micro_batches_seconds"] + sum(explained["ends_seconds"].values())
    assert whole == pytest.approx(explained["device_seconds"]) == pytest.approx(layout["step_seconds"])


def test_samples_of_a_run_without_pairs_are_no_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "configs/run/1b_pretrain.yaml", *BASE, "--layout", "own", "--out", str(tmp_path)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert " samples/s " in out and "pairs/s" not in out


def test_every_layout_can_be_laid_over_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ran(tmp_path, "--gpus", "16", "--json") == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree == json.loads((tmp_path / "plan.json").read_text())
    arch = known_architecture(BASE[1], BASE[3])
    for found in tree["layouts"]:
        config = load_config(Path(RUN), found["overrides"])
        assert vars(config.layout) == found["layout"] and not misfits(arch, config.layout, config.precision)
        assert config.batch.micro_tokens == found["micro_tokens"] and vars(config.recompute) == found["recompute"]
        assert config.layout.model_parallel_size * found["data_parallel"] == 16
        for stage in found["stages"]:
            parts = dict(stage["memory"])
            assert parts.pop("total") == pytest.approx(sum(parts.values()), rel=1e-12)
        assert sum(found["spent"].values()) == pytest.approx(found["step_seconds"], rel=1e-9)
    assert len({json.dumps(found["layout"]) for found in tree["layouts"]}) == len(tree["layouts"])


def test_a_run_that_is_here_is_measured(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(small), "--gpus", "2", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "siglip + qwen2" in out and "measured on the run's first batch" in out
    assert "6, 2 epochs of 24" in out
    found = planned(load_config(small), None, None, None)
    (image,) = {sample.places for sample in found.subject.samples}
    assert image == 64 and len({sample.scored for sample in found.subject.samples}) > 1
    assert found.count == 24 and found.subject.reference == 3


@pytest.mark.parametrize(
    ("run", "lengths"),
    [
        ("1a_align", Lengths(576 + 2, (30,), 30, 1, 576)),
        ("1b_pretrain", Lengths(576 + 60, (150,), 150, 1, 576)),
        ("2_dpo", Lengths(576 + 60, (200, 200), 400, 1, 576)),
    ],
)
def test_lengths_that_are_not_known_are_those_of_the_runs_kind(run: str, lengths: Lengths) -> None:
    found = planned(load_config(Path(f"configs/run/{run}.yaml")), BASE[1], BASE[3], None)
    assert set(found.subject.samples) == {lengths} and len(found.subject.samples) == 256


def test_the_runs_own_layout_is_taken_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ran(tmp_path, "--layout", "own", "--json", "layout.tensor=2", "recompute.llm=selective") == 0
    (found,) = json.loads(capsys.readouterr().out)["layouts"]
    assert (found["layout"]["tensor"], found["data_parallel"], found["micro_tokens"]) == (2, 4, 8192)
    assert found["recompute"] == {"encoder": "full", "llm": "selective"}


def test_what_does_not_fit_says_where_and_by_how_much(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--encoder", "siglip2-so400m-patch16-384", "--head", "qwen2.5-72b", "--gpus", "8"]
    assert main(["plan", RUN, *words, "--out", str(tmp_path), "--top", "2"]) == 1
    out = capsys.readouterr().out
    assert "memory: does not fit, " in out and " GiB too much on stage " in out and "Nothing fits" in out
    assert "unknown: --samples" in out
    tree = json.loads((tmp_path / "plan.json").read_text())
    peaks = [max(stage["memory"]["total"] for stage in found["stages"]) for found in tree["layouts"]]
    assert peaks == sorted(peaks) and peaks[0] > tree["machine"]["usable_bytes"]
    assert tree["steps"] is None and {(one["hours"], one["gpu_hours"]) for one in tree["layouts"]} == {(None, None)}


def test_nodes_are_as_many_devices_as_the_machine_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_machine(replace(gpu("h100"), devices_a_node=4), tmp_path / "machine.yaml")
    words = ["--machine", str(tmp_path / "machine.yaml"), "--nodes", "2", "--json", "--gpus", "8"]
    assert ran(tmp_path / "a", *words) == 0
    layouts = json.loads(capsys.readouterr().out)["layouts"]
    assert max(found["layout"]["tensor"] for found in layouts) <= 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--nodes", "2", "--gpus", "8"), "--nodes: 2 nodes of NVIDIA H100 SXM have 16 devices, found --gpus 8"),
        (("--gpus", "0"), "--gpus: expected at least 1, found 0"),
        (
            ("--gpus", "11", "batch.global_size=6"),
            "--gpus: expected a number of devices that some layout cuts this model over",
        ),
        (("--gpu", "v100"), "--gpu: expected one of a100, h100, h200, b200, found v100"),
        (("--gpu", "h100", "--machine", "x.yaml"), "expected one of --gpu and --machine, found both"),
        (("--machine", "none.yaml"), "none.yaml: expected a machine as `pivot bench calibrate` writes it"),
        (("--explain", "1000"), "--explain: expected a rank from 1 to"),
        (("--layout", "own", "--gpus", "3", "layout.tensor=2"), "--gpus: tensor 2 x pipeline 1 needs a multiple of 2"),
        (("--layout", "own", "layout.tensor=3"), "layout.tensor: LLM heads (14)"),
        (("--gpu", "a100", "precision.fp8=tensorwise"), "NVIDIA A100 SXM 80 GB has no rate of products in fp8"),
        (("layout.tensr=2",), "layout.tensr"),
        (("--scaling", "--gpus", "2048", "--layout", "own"), "curves end at 1,024 devices, found --gpus 2048"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    assert ran(tmp_path, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_model_that_is_not_here_can_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", RUN, "--out", str(tmp_path)]) == 2
    assert "name --encoder and --head, such as --encoder siglip2" in capsys.readouterr().err
    assert main(["plan", RUN, "--head", "qwen2.5-7b", "--out", str(tmp_path)]) == 2
    assert "expected both of --encoder and --head or neither" in capsys.readouterr().err


@pytest.mark.parametrize("differences", [(), ("rank 0: llm.x: expected none, found [2]",)])
def test_a_dry_run_is_of_the_first_layout_or_the_runs_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, differences: tuple[str, ...]
) -> None:
    built: list[Build] = []

    def dry_run(build: Build) -> DryRun:
        built.append(build)
        return DryRun(build, (StageFound(0, (), range(2), (0,), 1, 1, 2, differences),))

    monkeypatch.setattr(commands, "dry_run", dry_run)
    monkeypatch.setattr(DryRun, "table", lambda self: "as planned" if self.passed else self.differences[0])
    code = 1 if differences else 0
    assert ran(tmp_path, "--dry-run", "--json") == code
    best = json.loads(capsys.readouterr().out)
    assert vars(built[0].layout) == best["layouts"][0]["layout"] and best["dry_run"]["passed"] is (not differences)
    assert ran(tmp_path, "--dry-run", "--layout", "own", "layout.tensor=2") == code
    assert built[1].layout == Layout(tensor=2) and built[1].gpus == 8
    assert "Dry run of the run's own layout" in capsys.readouterr().out


@pytest.mark.parametrize("count", [0, 30])
def test_the_page_and_the_json_of_a_dry_run_have_every_stage_and_every_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """More of them than are printed."""
    differences = tuple(f"rank 1: llm.{n}: expected none, found [2]" for n in range(count))
    layers = chunks(24, Layout(pipeline=2))

    def dry_run(build: Build) -> DryRun:
        first = StageFound(0, layers[:1], range(4), (0,), 1_234_567, 89_012, 2469134, ())
        return DryRun(
            build, (first, StageFound(1, layers[1:], range(4, 8), (4,), 7_654_321, 7_654_000, 15308642, differences))
        )

    monkeypatch.setattr(commands, "dry_run", dry_run)
    assert ran(tmp_path, "--dry-run", "--layout", "own", "layout.pipeline=2") == (1 if count else 0)
    found = json.loads((tmp_path / "plan.json").read_text())["dry_run"]
    assert found["differences"] == list(differences) and found["passed"] is (not count)
    assert found["layout"]["pipeline"] == 2 and [stage["layers"] for stage in found["stages"]] == [
        [[0, 11]],
        [[12, 23]],
    ]
    assert [(s["ranks"], s["parameters"], s["trained"], s["weight_bytes"]) for s in found["stages"]] == [
        ([0, 3], 1_234_567, 89_012, 2469134),
        ([4, 7], 7_654_321, 7_654_000, 15308642),
    ]
    text = whole_page(tmp_path / "report.html").text
    assert "8 processes: tensor 1 x pipeline 2 x data 4" in text and "12-23" in text and "7,654,321" in text
    assert all(difference in text for difference in differences)
    assert ("as planned on every rank" in text) is (not count)


def test_columns_of_words_stand_to_the_left() -> None:
    assert aligned([["a", "number"], ["word", "1"]], left=(0,)) == ["a     number", "word       1"]


def test_gaps_in_the_curves_say_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_machine(replace(gpu("h100"), network=None), tmp_path / "machine.yaml")
    words = ["--machine", str(tmp_path / "machine.yaml"), "--scaling", "batch.global_size=16"]
    assert ran(tmp_path, *words) == 0
    gap, *_ = [line for line in capsys.readouterr().out.splitlines() if line.startswith("No layout of ")]
    assert gap.startswith("No layout of 16, 32, 64, ") and ", 16 with a batch that grows, 32 with " in gap
    assert "the network between nodes was not measured; write `network:` into the file" in gap
    tree = json.loads((tmp_path / "plan.json").read_text())
    assert tree["scaling"]["strong"][0]["why_none"] is None
    assert all(point["why_none"] for side in ("strong", "weak") for point in tree["scaling"][side][1:])


def test_scaling_is_the_best_of_each_number_of_devices(tmp_path: Path) -> None:
    found = planned(load_config(Path(RUN), ["batch.global_size=32"]), BASE[1], BASE[3], 20000)
    curves = scaling(found.subject, Layout(), 256, gpu("h100"))
    assert [point.gpus for point in curves.strong] == [256, 512, 1024] == [point.gpus for point in curves.weak]
    sizes: list[Any] = [point.best and point.best.subject.batch.global_size for point in curves.weak]
    assert curves.weak[0] == curves.strong[0] and sizes in ([32, 64, 128], [None, 64, 128])
    for point in curves.weak[1:]:
        assert point.best and point.best.samples_a_second * point.best.step_seconds == pytest.approx(point.gpus / 8)
    for points in (curves.strong, curves.weak):
        known = [(point.best, share) for point, share in zip(points, against_ideal(points), strict=True) if point.best]
        first, _ = known[0]
        for best, share in known:
            assert share == pytest.approx(best.samples_a_second / first.samples_a_second * first.gpus / best.gpus)
