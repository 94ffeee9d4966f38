"""Runs as `pivot bench layouts` times them: the same steps as in training, and whose time they take."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from torch.utils.flop_counter import FlopCounterMode

from pivot_megatron.bench.layout_job import Job, RankFound, make_job, read_ranks
from pivot_megatron.bench.step_regions import SHARES, timed_parts
from pivot_megatron.cli import main
from pivot_megatron.config.load import dump_config, load_config
from pivot_megatron.config.schema import Layout, Recompute
from pivot_megatron.families.architecture import EncoderArchitecture
from pivot_megatron.model.flops import Flops, pack_flops
from pivot_megatron.plan.hardware import gpu
from pivot_megatron.plan.machine import write_machine
from pivot_megatron.runtime.regions import Regions
from pivot_megatron.train.run_folder import read_metrics
from pivot_megatron.train.session import prepare
from pivot_megatron.train.step import train_step
from pivot_megatron.train.tracking import Trackers
from pivot_megatron.train.trainer import watched
from tests.dist.runs import config_tree, make_world, train_at, write_config
from tests.harness import Workers
from tests.matrix import DP2, PP2, SINGLE, TP2

JOB = Job("", warm_up=1, timed=2, divided=2, repeat=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"), pairs=24)


def run_yaml(data: Path, folder: Path, layout: Layout) -> Path:
    tree = config_tree(data, folder / "run")
    tree["batch"]["steps"] = tree["checkpoints"]["every"] = JOB.run_steps
    path = write_config(folder / "run.yaml", tree)
    path.write_text(dump_config(replace(load_config(path), layout=layout)))
    return path


def found_by(workers: Workers, job: Job, processes: int) -> list[RankFound]:
    workers.run(make_job, None, processes, job)
    return read_ranks(load_config(Path(job.config)).out)


RUNS = (SINGLE, TP2, PP2, DP2)


@pytest.fixture(scope="module")
def ran(workers: Workers, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[Path, list[RankFound]]]:
    """By layout's name: the run's folder, and what its processes found."""
    found = {}
    for name, layout, processes in RUNS:
        folder = tmp_path_factory.mktemp(name)
        job = replace(JOB, config=str(run_yaml(data, folder, layout)))
        found[name] = folder / "run", found_by(workers, job, processes)
    return found


@pytest.mark.parametrize("entry", RUNS, ids=lambda entry: entry[0])
def test_time_is_divided_by_what_took_it(
    ran: Mapping[str, tuple[Path, list[RankFound]]], entry: tuple[str, Layout, int]
) -> None:
    name, layout, world = entry
    run, ranks = ran[name]
    assert [rank.rank for rank in ranks] == list(range(world))
    assert [rank.stage for rank in ranks] == ([0, 1] if layout.pipeline > 1 else [0] * world)
    for rank in ranks:
        assert set(rank.seconds) <= set(SHARES)
        assert all(rank.seconds[part] > 0 for part in ("data", "head", "optimizer", "rest"))
        assert ("encoder" in rank.seconds) == (rank.stage == 0)
        assert ("communication" in rank.seconds) == (world > 1)
        assert ("idle" in rank.seconds) == (layout.pipeline > 1)
        assert rank.peak_bytes > 2**20
    lines = read_metrics(run)
    steps = sum(line["step_seconds"] for line in lines[-JOB.divided :]) - ranks[0].looked[-1]
    assert sum(ranks[0].seconds.values()) >= steps > 0
    assert len(lines) == JOB.steps
    assert not list((run / "checkpoints").iterdir())
    assert not (run / "finished.json").exists()


def test_a_steps_flops_are_the_same_at_every_layout(ran: Mapping[str, tuple[Path, list[RankFound]]]) -> None:
    alone, *others = ([line["flops"] for line in read_metrics(run)] for run, _ in ran.values())
    assert len(alone) == JOB.steps and min(alone) > 0
    assert all(counts == pytest.approx(alone, rel=1e-12) for counts in others)


@pytest.mark.parametrize("entry", [TP2, PP2], ids=lambda entry: entry[0])
def test_what_is_timed_is_training(
    ran: Mapping[str, tuple[Path, list[RankFound]]],
    workers: Workers,
    data: Path,
    tmp_path: Path,
    entry: tuple[str, Layout, int],
) -> None:
    """Losses and gradient norms are a plain run's, bit for bit, under the timers too."""
    name, layout, processes = entry
    workers.run(train_at_own, None, processes, run_yaml(data, tmp_path, layout))
    lines = [read_metrics(run)[: JOB.steps] for run in (ran[name][0], tmp_path / "run")]
    timed, plain = ([(line["loss"], line["grad_norm"]) for line in some] for some in lines)
    assert timed == plain
    assert len(timed) == JOB.steps


def train_at_own(path: Path) -> int:
    """A worker's job: the whole run."""
    return train_at(path, load_config(path).layout)


def test_one_batch_again_and_again(workers: Workers, data: Path, tmp_path: Path) -> None:
    job = replace(JOB, config=str(run_yaml(data, tmp_path, Layout())), repeat=True)
    found_by(workers, job, 1)
    lines = read_metrics(tmp_path / "run")
    assert len({line["keys"] for line in lines}) == 1
    assert len({line["flops"] for line in lines}) == 1
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.slow
def test_every_layout_of_two_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_machine(gpu("h100"), tmp_path / "machine.yaml")  # whose plan a CPU's times have nothing to do with
    arguments = ["--shape", "tiny", "--rounds", "2", "--steps", "2", "--processes", "2"]
    arguments += ["--machine", str(tmp_path / "machine.yaml")]
    assert main(["bench", "layouts", *arguments, "--out", str(tmp_path / "b"), "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree == json.loads((tmp_path / "b" / "layouts.json").read_text())
    assert {one["name"] for one in tree["layouts"]} == {"tp1_pp1_dp2", "tp2_pp1_dp1", "tp1_pp2_dp1"}
    assert [misfit["name"] for misfit in tree["misfits"]] == ["tp1_pp2_vpp2_dp1"]
    assert tree["failed"] == {}
    assert tree["reference_seconds"] > 0
    weights = sum(file.stat().st_size for file in (tmp_path / "b" / "world" / "checkpoint").rglob("*.distcp"))
    assert weights > 0
    for one in tree["layouts"]:
        assert_consistent(one, tree["gemm_peak"], weights)
        assert one["step_off"] == pytest.approx(one["predicted"]["step_seconds"] / one["step_seconds"]["median"] - 1)
        assert len(one["predicted"]["peak_bytes"]) == one["pipeline"]
    assert (tmp_path / "b" / "report.html").stat().st_size > 10_000
    assert (tmp_path / "b" / "layouts.png").read_bytes().startswith(b"\x89PNG")


def test_a_machine_without_the_runs_precision_is_refused_before_any_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    h100 = gpu("h100")
    rates = replace(h100.rates[1], gemm={dtype: line for dtype, line in h100.rates[1].gemm.items() if dtype != "fp32"})
    write_machine(replace(h100, rates={1: rates}), tmp_path / "machine.yaml")
    arguments = ["--shape", "tiny", "--processes", "1", "--machine", str(tmp_path / "machine.yaml")]
    assert main(["bench", "layouts", *arguments, "--out", str(tmp_path / "b")]) == 2
    assert "has no rate of products in fp32, it has bf16, fp8" in capsys.readouterr().err
    assert not (tmp_path / "b" / "runs").exists()


def assert_consistent(one: Mapping[str, object], gemm_peak: float, weights: int) -> None:
    layout: dict = dict(one)  # type: ignore[type-arg]
    assert len(layout["runs"]) == 2
    ways = []
    for run in layout["runs"]:
        steps = run["steps"]
        assert len(steps) == 2
        assert all(0 <= step["data_seconds"] < step["seconds"] for step in steps)
        assert all(step["pairs"] == 2 and step["tokens"] > 0 for step in steps)
        seconds = sum(step["seconds"] for step in steps)
        ways.append((4 / seconds, seconds / 2, sum(step["flops"] for step in steps) / seconds))
    assert all(len(rank["rates"]) == 3 and min(rank["rates"]) > 0 for run in layout["runs"] for rank in run["ranks"])
    if layout["steps"] == [4, 4]:
        for name, values in zip(("pairs_a_second", "step_seconds", "flops_a_second"), zip(*ways)):
            assert layout[name]["low"] == pytest.approx(min(values))
            assert layout[name]["median"] == pytest.approx(sum(values) / 2)
            assert layout[name]["high"] == pytest.approx(max(values))
    for way in ("low", "median", "high"):
        assert layout["mfu"][way] == pytest.approx(layout["flops_a_second"][way] / gemm_peak)
    assert layout["pairs_a_second"]["low"] * layout["step_seconds"]["high"] == pytest.approx(2)
    assert len(layout["peak_bytes"]) == layout["pipeline"] == len(layout["stage_shares"])
    assert min(layout["peak_bytes"]) > weights
    for shares in (layout["shares"], *layout["stage_shares"]):
        assert sum(shares.values()) == pytest.approx(1.0)
    assert layout["shares"]["communication"] > 0
    assert (layout["shares"]["idle"] > 0) == (layout["pipeline"] > 1)


def flops_by_region(path: Path, recompute: Literal["none", "full"]) -> tuple[dict[str, float], EncoderArchitecture, Flops]:
    """A worker's job: what torch counts in each region of one step; the encoder, and what one forward pass takes by count."""
    config = replace(load_config(path), recompute=Recompute(recompute, recompute))
    with Trackers(config.name) as trackers, watched(config) as watch:
        session = prepare(config, watch, trackers, lambda: None)
        data = session.loader.with_reference(session.loader.load(0))
        arch = session.flops.arch
        forwards = sum((pack_flops(arch, batch) for batch in data.micro_batches), Flops())
        with FlopCounterMode(display=False) as counter:
            regions = Regions("rest", clock=counter.get_total_flops)
            with timed_parts(session, regions):
                train_step(session.wrapped, session.optimization, session.objective, data.micro_batches, None)
        return regions.stop(), arch.encoder, forwards


@pytest.mark.parametrize(("recompute", "times"), [("none", 3), ("full", 4)])
def test_each_operation_counts_to_its_part(
    workers: Workers, data: Path, tmp_path: Path, recompute: str, times: int
) -> None:
    """With torch's counter of operations for a clock. On a CPU it sees no attention, and not all of the logits."""
    path = run_yaml(data, tmp_path, Layout())
    ((found, encoder, once),) = workers.run(flops_by_region, None, 1, path, recompute)
    places = once.patches / (2 * 3 * encoder.patch_size**2 * encoder.hidden)
    layers = encoder.layers - 1  # features are taken before the last
    weights = 4 * encoder.hidden**2 + 2 * encoder.hidden * encoder.padded_ffn
    assert found["encoder"] == 2 * once.patches + 3 * once.projector + times * 2 * places * layers * weights
    assert found["head"] > times * once.layers
    assert (found["optimizer"], found["rest"]) == (0, 0)
