"""lmms-eval's results of one model to scores in per cent, and to the reason for each that is not there."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pivot_megatron.errors import UserError
from pivot_megatron.probe.benchmarks import Benchmark, Suite
from pivot_megatron.probe.interval import Z95, Interval


@dataclass(frozen=True)
class Result:
    """In per cent of a full score. `stderr`: None where lmms-eval gives none."""

    score: float
    stderr: float | None

    @property
    def interval(self) -> Interval | None:
        """The 95 % interval of the standard error; None without one."""
        if self.stderr is None:
            return None
        return Interval(self.score - Z95 * self.stderr, self.score + Z95 * self.stderr)


@dataclass(frozen=True)
class ModelResults:
    """`results` by benchmark; of every other one, `missing` has the reason. `others`: tasks in the files that are in no group."""

    model: str
    files: tuple[Path, ...]
    results: Mapping[str, Result]
    missing: Mapping[str, str]
    others: tuple[str, ...]

    def average(self, names: Sequence[str]) -> float | None:
        """The mean of these benchmarks; None where one is missing."""
        if any(name in self.missing for name in names):
            return None
        return statistics.fmean(self.results[name].score for name in names)

    def overall(self, suite: Suite) -> float | None:
        """The mean of the groups' averages; None where a benchmark is missing."""
        found = [self.average(list(group)) for group in suite.groups.values()]
        whole = [average for average in found if average is not None]
        return statistics.fmean(whole) if len(whole) == len(found) else None


def read_model(path: Path, suite: Suite) -> ModelResults:
    """`path`: a results file of lmms-eval, or a folder of them (`*_results.json`) that are one model's.

    A benchmark is missing where its task is not there, ran on a part of its samples, or has null for a score. Raises
    UserError for files that are not lmms-eval's, of several models, with a task twice or with none of the suite's, and for a
    metric that is not there or lies outside 0 and its full score.
    """
    files = _files(path)
    trees = {file: _read(file) for file in files}
    models = {file: str(tree.get("model_name") or "") for file, tree in trees.items()}
    if len(set(models.values())) > 1:
        raise UserError(f"{path}: expected results of one model, found {' and '.join(sorted(set(models.values())))}")
    where: dict[str, Path] = {}
    for file, tree in trees.items():
        for task in tree["results"]:
            if task in where:
                raise UserError(f"{path}: {task}: expected it once, found it in {where[task].name} and {file.name}")
            where[task] = file
    benchmarks = suite.benchmarks
    wanted = {benchmark.task for benchmark in benchmarks.values()}
    if not wanted & where.keys():
        raise UserError(
            f"{path}: expected tasks such as {', '.join(sorted(wanted)[:3])}, found {', '.join(sorted(where)) or 'none'}"
        )
    results: dict[str, Result] = {}
    missing: dict[str, str] = {}
    for name, benchmark in benchmarks.items():
        found = _result(where[benchmark.task], trees, benchmark) if benchmark.task in where else "not in the results"
        if isinstance(found, str):
            missing[name] = found
        else:
            results[name] = found
    return ModelResults(models[files[0]] or str(path), files, results, missing, tuple(sorted(where.keys() - wanted)))


def _files(path: Path) -> tuple[Path, ...]:
    if not path.is_dir():
        return (path,)
    found = tuple(sorted(path.glob("*_results.json")))
    if not found:
        raise UserError(
            f"{path}: expected *_results.json, found none; give the folder that lmms-eval made for the model below --output_path"
        )
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{file}: not JSON: {error}") from None
    tasks = tree.get("results") if isinstance(tree, dict) else None
    if not isinstance(tasks, dict) or not all(isinstance(task, dict) for task in tasks.values()):
        raise UserError(f"{file}: expected lmms-eval's results, with metrics by task under `results`; found none")
    return dict(tree)


def _result(file: Path, trees: Mapping[Path, Mapping[str, Any]], benchmark: Benchmark) -> Result | str:
    """Or why there is none."""
    tree = trees[file]
    task = tree["results"][benchmark.task]
    if benchmark.metric not in task:
        metrics = [key for key in task if "," in key and "_stderr" not in key]
        raise UserError(
            f"{file}: {benchmark.task}: expected the metric {benchmark.metric}, found {' and '.join(metrics) or 'none'}; "
            "where this lmms-eval names it so, say it in a file for --benchmarks"
        )
    value = task[benchmark.metric]
    if value is None:
        return "null for a score"
    if not _is_number(value) or not 0 <= value <= benchmark.full:
        raise UserError(
            f"{file}: {benchmark.task}: {benchmark.metric}: expected a number from 0 to {benchmark.full:g}, found {value!r}"
        )
    if partial := _partial(tree, benchmark.task):
        return partial
    stderr = task.get(benchmark.stderr)
    percent = 100 / benchmark.full
    return Result(percent * value, percent * stderr if _is_number(stderr) else None)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _partial(tree: Mapping[str, Any], task: str) -> str | None:
    """What part of its samples a task ran on, where it is not all."""
    config, count = tree.get("config") or {}, (tree.get("n-samples") or {}).get(task) or {}
    ran, there, offset = count.get("effective"), count.get("original"), config.get("offset")
    if not offset and (config.get("limit") is None or (ran == there and count)):
        return None
    return f"ran on {ran} of {there} samples{f', from number {offset} on' if offset else ''}; leave out --limit and --offset"
