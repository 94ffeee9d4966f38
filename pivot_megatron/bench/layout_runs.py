"""One layout run once, in processes of its own, and what it left."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pivot_megatron.bench.layout_cases import Case
from pivot_megatron.bench.layout_job import Job, RankFound, read_ranks
from pivot_megatron.config.load import dump_config
from pivot_megatron.config.schema import Checkpoints, Dpo, RunConfig, Tracking
from pivot_megatron.data.reference import pass_seconds
from pivot_megatron.errors import RunError
from pivot_megatron.train.run_folder import read_metrics


@dataclass(frozen=True)
class Step:
    """`seconds` with those waited for data. `flops`: by count, see `model/flops.py`. `rate`: FLOP/s, the lower of what all
    devices together multiplied matrices at before and after."""

    seconds: float
    data_seconds: float
    pairs: int
    tokens: int
    flops: float
    rate: float


@dataclass(frozen=True)
class LayoutRun:
    """`steps`: those that were timed."""

    steps: tuple[Step, ...]
    ranks: tuple[RankFound, ...]

    @property
    def fastest(self) -> float:
        """FLOP/s, the most that all devices together multiplied matrices at between steps."""
        return max(_rates(self.ranks))


@dataclass(frozen=True)
class Amount:
    """How much of each layout is run: see `Job`."""

    rounds: int
    warm_up: int
    timed: int
    divided: int
    repeat: bool


def run_layout(case: Case, amount: Amount, processes: int, folder: Path) -> LayoutRun:
    """Raises RunError, with the last line that the run said, where it fails."""
    folder.mkdir(parents=True)
    job = Job(str(folder / "run.yaml"), amount.warm_up, amount.timed, amount.divided, amount.repeat)
    config = _for_job(case.config, job, folder / "run")
    Path(job.config).write_text(dump_config(config))
    job.write(folder / "job.json")
    command = ["bench", "layout-run", str(folder / "job.json"), "--processes", str(processes)]
    _pivot(command, folder / "log.txt")
    lines = read_metrics(config.out)[job.warm_up : job.warm_up + job.timed]
    ranks = read_ranks(config.out)
    return LayoutRun(steps_of(lines, ranks), tuple(ranks))


def steps_of(lines: Sequence[Mapping[str, Any]], ranks: Sequence[RankFound]) -> tuple[Step, ...]:
    """Of a run's metrics, without the looks at the machine between them, which the first rank, whose metrics they are, waited
    for."""
    rates = _rates(ranks)
    return tuple(
        Step(
            line["step_seconds"] - looked,
            max(0.0, line["data_seconds"] - looked),
            line["pairs"],
            line["tokens"],
            line["flops"],
            min(rates[n : n + 2]),
        )
        for n, (line, looked) in enumerate(zip(lines, ranks[0].looked, strict=False))
    )


def _rates(ranks: Sequence[RankFound]) -> list[float]:
    """Of all devices together, each time that they were looked at."""
    return [sum(at_once) for at_once in zip(*(rank.rates for rank in ranks), strict=True)]


def make_reference(config: RunConfig, processes: int, folder: Path) -> float:
    """The reference log-probs of a run, where it has any and they are not there yet. Returns the seconds that they took, whenever
    that was."""
    if not (isinstance(config.objective, Dpo) and config.objective.reference == "cached"):
        return 0.0
    folder.mkdir(parents=True)
    path = folder / "run.yaml"
    path.write_text(dump_config(replace(config, out=folder / "run")))
    told = _pivot(["reference", str(path), "--processes", str(processes)], folder / "log.txt")
    return sum(pass_seconds(Path(line)) for line in told)


def _for_job(config: RunConfig, job: Job, out: Path) -> RunConfig:
    steps = job.run_steps
    batch = replace(config.batch, epochs=None, steps=steps)
    return replace(config, out=out, batch=batch, checkpoints=Checkpoints(every=steps), tracking=Tracking())


def _pivot(arguments: Sequence[str], log: Path) -> list[str]:
    """`pivot ARGUMENTS` in a child; the lines that it printed. What it said besides goes to `log`."""
    command = [sys.executable, "-m", "pivot_megatron.cli", *arguments]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    with log.open("wb") as file:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=file, env=environment)
    if done.returncode:
        raise RunError(f"{_last_words(log.read_text(errors='replace'), done.returncode)}; see {log}")
    return done.stdout.decode().splitlines()


def _last_words(said: str, code: int) -> str:
    """The line that names an error, of a traceback or alone, or else the last."""
    lines = [line.removeprefix("pivot: ") for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or [f"ended with {code}"])[-1]
