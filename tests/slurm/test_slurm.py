"""launch/ on a real SLURM of two nodes: what is broken off goes on, and ends as if it had not been."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pivot_megatron.config.schema import Layout
from pivot_megatron.train.run_folder import read_metrics
from tests.dist.runs import config_tree, make_world, train_at, write_config
from tests.harness import Workers
from tests.slurm.cluster import Cluster, cluster, missing_programs, wait_for

ROOT = Path(__file__).parents[2]
STEPS = 40
SAME = ("step", "loss", "grad_norm", "keys", "reward_margin")

pytestmark = pytest.mark.skipif(bool(missing_programs()), reason=f"not installed: {', '.join(missing_programs())}")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    facts = folder / "env.sh"
    facts.write_text(
        f'source "$PIVOT_ROOT/launch/env/bare.sh"\nPIVOT=({sys.executable} -m pivot_megatron.cli)\nPIVOT_PROCESSES=1\n'
    )
    with pytest.MonkeyPatch.context() as environment:
        for name, value in (("PIVOT_ENV", facts), ("PIVOT_ROOT", ROOT), ("PYTHONPATH", ROOT)):
            environment.setenv(name, str(value))
        with cluster(folder / "cluster") as made:
            yield made


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def tree(world: Path, out: Path, steps: int = STEPS) -> dict[str, Any]:
    made = config_tree(world, out)
    # One thread each, wherever they run: sums are added up in the same order.
    return made | {
        "batch": {**made["batch"], "steps": steps},
        "checkpoints": {"every": 10, "keep": 2},
        "layout": {"cpu_threads": 1},
    }


@pytest.fixture(scope="module")
def unbroken(world: Path, workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("unbroken")
    config = write_config(folder / "run.yaml", tree(world, folder / "run"))
    workers.run(train_at, None, 2, config, Layout(cpu_threads=1))
    return picked(folder / "run")


def picked(run: Path) -> list[dict[str, Any]]:
    return [{name: line[name] for name in SAME} for line in read_metrics(run)]


def submit(slurm: Cluster, folder: Path, *arguments: str, options: tuple[str, ...] = ("--nodes=2",)) -> str:
    log = f"--output={folder / '%j.out'}"
    return slurm.run(
        "sbatch", "--parsable", log, *options, str(ROOT / "launch" / "pivot_dpo.sh"), *arguments, cwd=folder
    )


def ended(slurm: Cluster, job: str, seconds: float = 400) -> str:
    running = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING", "PREEMPTED")
    wait_for(lambda: slurm.state(job) not in running, seconds, f"job {job} to end")
    return slurm.state(job)


def steps_of(run: Path) -> int:
    return len(read_metrics(run)) if (run / "metrics.jsonl").exists() else 0


def under_way(slurm: Cluster, world: Path, folder: Path, done: int, steps: int = STEPS) -> str:
    """The job of a run of `steps` steps, once `done` of them are made."""
    job = submit(slurm, folder, str(write_config(folder / "run.yaml", tree(world, folder / "run", steps))))
    wait_for(lambda: steps_of(folder / "run") >= done, 200, f"{done} steps")
    return job


@pytest.mark.long  # SLURM lets a job that is queued again wait for two minutes
def test_a_preempted_run_is_queued_again_and_goes_on(
    slurm: Cluster, world: Path, unbroken: list[dict[str, Any]], tmp_path: Path
) -> None:
    """A job of more weight takes both nodes: the run saves between two checkpoints, makes way, and ends with the same losses."""
    job = under_way(slurm, world, tmp_path, 3)
    other = slurm.run(
        "sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 5"
    )
    wait_for(lambda: slurm.state(other) == "COMPLETED", 200, "the other job")
    assert ended(slurm, job) == "COMPLETED"
    log = (tmp_path / f"{job}.out").read_text()
    assert "stopped and saved" in log and int(slurm.field(job, "Restarts")) >= 1, log
    assert not (tmp_path / "run" / "requeue.json").exists()
    assert picked(tmp_path / "run") == unbroken


@pytest.mark.long  # SLURM lets a job that is queued again wait for two minutes
def test_a_killed_node_costs_the_steps_since_the_last_checkpoint(
    slurm: Cluster, world: Path, unbroken: list[dict[str, Any]], tmp_path: Path
) -> None:
    job = under_way(slurm, world, tmp_path, 12)
    slurm.kill_node("n2")
    wait_for(lambda: slurm.state(job) != "RUNNING", 200, "the job to be off the nodes")
    slurm.start_node("n2")
    assert ended(slurm, job) == "COMPLETED", (tmp_path / f"{job}.out").read_text()
    assert int(slurm.field(job, "Restarts")) >= 1
    assert picked(tmp_path / "run") == unbroken
    snapshots = sorted(path.name for path in (tmp_path / "run" / "launch").iterdir() if path.is_dir())
    assert snapshots[:2] == [f"{job}-0", f"{job}-1"]


@pytest.mark.slow
def test_a_wrong_config_is_not_queued_again(slurm: Cluster, world: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", tree(world, tmp_path / "run"))
    job = submit(slurm, tmp_path, str(config), "layout.tensr=2")
    assert ended(slurm, job) == "FAILED"
    assert slurm.field(job, "ExitCode") == "2:0" and slurm.field(job, "Restarts") == "0"
    assert "layout.tensr: unknown key; did you mean layout.tensor?" in (tmp_path / f"{job}.out").read_text()


@pytest.mark.long  # SLURM lets a job that is queued again wait for two minutes
def test_what_fails_before_anything_is_saved_is_tried_again_and_given_up(
    slurm: Cluster, world: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "run.yaml", tree(world, tmp_path / "run"))
    breaks = tmp_path / "breaks.sh"
    breaks.write_text(f'#!/bin/sh\n[ "$1" = train ] && exit 1\nexec {sys.executable} -m pivot_megatron.cli "$@"\n')
    breaks.chmod(0o755)
    facts = tmp_path / "env.sh"
    facts.write_text(f'source "{os.environ["PIVOT_ENV"]}"\nPIVOT=({breaks})\nPIVOT_RETRIES=2\n')
    job = submit(slurm, tmp_path, str(config), options=("--nodes=1", f"--export=ALL,PIVOT_ENV={facts}"))
    assert ended(slurm, job) == "FAILED"
    log = (tmp_path / f"{job}.out").read_text()
    assert slurm.field(job, "Restarts") == "1" and "failed with 1 after no checkpoint; queued again" in log
    assert "failed with 1, 2 times after no checkpoint: not queued again" in log


@pytest.mark.slow
def test_a_task_a_node_and_an_array_over_overrides(slurm: Cluster, world: Path, tmp_path: Path) -> None:
    """Each line of the sweep is a run of its own, in a folder of its own; each node starts its processes itself."""
    config = write_config(tmp_path / "run.yaml", tree(world, tmp_path / "run", steps=2))
    rates = ("1e-4", "1e-3")
    (tmp_path / "sweep.txt").write_text(
        "".join(f"optimizer.learning_rate={rate} 'objective.losses={{ipo: 1.0}}'\n" for rate in rates)
    )
    facts = tmp_path / "env.sh"
    facts.write_text(f'source "{os.environ["PIVOT_ENV"]}"\nPIVOT_TASKS=node\nPIVOT_PROCESSES=2\n')
    export = f"--export=ALL,PIVOT_SWEEP={tmp_path / 'sweep.txt'},PIVOT_ENV={facts}"
    job = submit(slurm, tmp_path, str(config), options=("--nodes=1", "--array=0-1", export))
    for n, rate in enumerate(rates):
        assert ended(slurm, f"{job}_{n}") == "COMPLETED", [p.read_text() for p in tmp_path.glob("*.out")]
        run = tmp_path / "run" / f"sweep-{n}"
        assert steps_of(run) == 2
        config_text = (run / "config.yaml").read_text()
        assert f"learning_rate: {float(rate)}" in config_text and "ipo: 1.0" in config_text
        assert json.loads((run / "environment.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_a_chain_hands_the_encoder_on(slurm: Cluster, world: Path, tmp_path: Path) -> None:
    """Each run begins when the one before it has finished; where one fails, those after it leave the queue."""
    first = tree(world, tmp_path / "first", steps=2)
    second = tree(world, tmp_path / "second", steps=2)
    second["model"] = {part: {"checkpoint": str(tmp_path / "first")} for part in ("encoder", "projector", "llm")}
    broken = tree(world, tmp_path / "third", steps=2) | {"seed": "x"}
    files = [
        write_config(tmp_path / f"{name}.yaml", made)
        for name, made in (("a", first), ("b", second), ("c", broken), ("d", second))
    ]
    command = (str(ROOT / "launch" / "evolve.sh"), "--nodes=1", f"--output={tmp_path / '%j.out'}", "--")
    jobs = [line.split()[0] for line in slurm.run(*command, *map(str, files), cwd=tmp_path).splitlines()]
    states = [ended(slurm, job) for job in jobs]
    assert states == ["COMPLETED", "COMPLETED", "FAILED", "CANCELLED"], [p.read_text() for p in tmp_path.glob("*.out")]
    assert read_metrics(tmp_path / "second")[0]["reward_margin"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.slow
def test_a_schedule_is_a_chain_of_runs_and_judgements(slurm: Cluster, world: Path, tmp_path: Path) -> None:
    run = tree(world, tmp_path / "unused", steps=2)
    model = run.pop("model")
    del run["name"], run["out"]
    write_config(tmp_path / "run.yaml", run)
    align = {"base": "run.yaml", "objective": {"kind": "sft"}, "parameters": [{"match": "encoder.*", "rate": "frozen"}]}
    schedule = {
        "name": "chain",
        "out": str(tmp_path / "out"),
        "encoder": model["encoder"],
        "phases": [
            {"name": "align", "head": model["llm"], "run": align},
            {"name": "dpo", "run": {"base": "run.yaml"}},
        ],
    }
    file = write_config(tmp_path / "schedule.yaml", schedule)
    command = (str(ROOT / "launch" / "evolve.sh"), "--nodes=2", f"--output={tmp_path / '%j.out'}", "--", str(file))
    told = [line.split() for line in slurm.run(*command, cwd=tmp_path).splitlines()]
    assert [name for _, name in told] == ["align", "align-judge", "dpo", "dpo-judge"]
    states = [ended(slurm, job) for job, _ in told]
    assert states == ["COMPLETED"] * 4, [p.read_text() for p in tmp_path.glob("*.out")]
    assert (tmp_path / "out" / "dpo" / "encoder" / "config.json").exists()
    assert not (tmp_path / "out" / "align" / "encoder").exists()
    assert read_metrics(tmp_path / "out" / "dpo" / "run")[0]["reward_margin"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.long
def test_layouts_are_benched_side_by_side(slurm: Cluster, world: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", tree(world, tmp_path / "run"))
    pipeline = write_config(tmp_path / "pp2.yaml", {"layout": {"pipeline": 2}})
    data = write_config(tmp_path / "dp2.yaml", {"layout": {"tensor": 1}})
    command = (str(ROOT / "launch" / "bench_layouts.sh"), "--nodes=2", f"--output={tmp_path / '%j.out'}", "--")
    slurm.environment = {**slurm.environment, "PIVOT_STEPS": "8"}
    told = slurm.run(*command, str(config), str(pipeline), str(data), cwd=tmp_path)
    table = told.splitlines()[-1]
    assert ended(slurm, table) == "COMPLETED", [p.read_text() for p in tmp_path.glob("*.out")]
    (folder,) = (tmp_path / "runs" / "bench-layouts").iterdir()
    rows = [row.split()[:2] for row in (folder / "table.txt").read_text().splitlines()]
    assert [(Path(run).name, steps) for run, steps in rows] == [("run", "steps"), ("pp2", "3"), ("dp2", "3")]


@pytest.mark.long  # SLURM lets a job that is queued again wait for two minutes
def test_scancel_is_told_apart_from_a_failure(slurm: Cluster, world: Path, tmp_path: Path) -> None:
    """`scancel --signal=USR1` saves and queues again; a plain `scancel` ends the job for good, saved."""
    job = under_way(slurm, world, tmp_path, 3, steps=10000)
    slurm.run("scancel", f"--signal={signal.SIGUSR1.name.removeprefix('SIG')}", job)
    wait_for(lambda: int(slurm.field(job, "Restarts")) == 1, 200, "the job to be queued again")
    before = steps_of(tmp_path / "run")
    wait_for(lambda: steps_of(tmp_path / "run") >= before + 3, 400, "three more steps")
    slurm.run("scancel", job)
    assert ended(slurm, job) == "CANCELLED"
    steps = [line["step"] for line in read_metrics(tmp_path / "run")]
    assert steps == list(range(1, len(steps) + 1)) and slurm.field(job, "Restarts") == "1"
