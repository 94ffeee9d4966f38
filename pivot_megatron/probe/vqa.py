"""The paper's table of visual question answering, from lmms-eval's results of several models."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pivot_megatron.probe.benchmarks import Suite, read_suite
from pivot_megatron.probe.interval import Z95, Interval, change_text
from pivot_megatron.probe.table import aligned, figure
from pivot_megatron.probe.vqa_results import ModelResults, Result, read_model
from pivot_megatron.report.facts import short_names

NONE = "-"


def change(first: Result, other: Result) -> tuple[float, Interval | None]:
    """`other` less `first`, in points, and its 95 % interval as if their samples were drawn apart: over the same samples, where
    models mostly agree, it is wider than need be. None where one has no standard error."""
    points = other.score - first.score
    if first.stderr is None or other.stderr is None:
        return points, None
    half = Z95 * math.hypot(first.stderr, other.stderr)
    return points, Interval(points - half, points + half)


@dataclass(frozen=True)
class VqaReport:
    """The first of `models` is what the others are held against. `benchmarks`: the file of the suite."""

    suite: Suite
    models: tuple[ModelResults, ...]
    benchmarks: Path

    @property
    def labels(self) -> list[str]:
        """The models' names, or the files where two have the same."""
        names = [model.model for model in self.models]
        return names if len(set(names)) == len(names) else [str(model.files[0]) for model in self.models]

    def rows(self) -> list[list[str]]:
        """Heads, then the average of each group with its benchmarks, then that of all."""
        labels = self.labels
        rows = [["", labels[0], *(head for label in labels[1:] for head in (label, "against the first"))]]
        for group, members in self.suite.groups.items():
            rows.append([group, *self._averages(partial(ModelResults.average, names=list(members)))])
            rows += [[f"  {name}", *self._scores(name)] for name in members]
        rows.append(["average", *self._averages(partial(ModelResults.overall, suite=self.suite))])
        return rows

    def _averages(self, of: Callable[[ModelResults], float | None]) -> list[str]:
        first, *others = map(of, self.models)
        cells = [_percent(first)]
        for other in others:
            cells += [_percent(other), NONE if first is None or other is None else f"{other - first:+.2f}"]
        return cells

    def _scores(self, name: str) -> list[str]:
        first, *others = (model.results.get(name) for model in self.models)
        cells = [_percent(first.score if first else None)]
        for other in others:
            cells += [_percent(other.score if other else None), _change(first, other)]
        return cells

    def notes(self) -> list[str]:
        """By model, what is missing and why, and tasks of its files that are in no group."""
        told, tasks = [], {name: benchmark.task for name, benchmark in self.suite.benchmarks.items()}
        for label, model in zip(self.labels, self.models, strict=True):
            told += [f"MISSING {name} of {label}: {tasks[name]}: {why}" for name, why in model.missing.items()]
            if model.missing:
                short = f"{len(model.missing)} of {len(tasks)}"
                told.append(f"MISSING {short} of {label}: no average of their groups, and none of all")
            if model.others:
                told.append(f"not in the table, of {label}: {', '.join(model.others)}")
        return told

    def published(self) -> list[list[str]]:
        rows = [["the paper's averages", "base", "SFT", "PIVOT"]]
        for encoder, found in self.suite.published.items():
            rows.append([encoder, *(NONE if n is None else f"{n:.1f}" for n in (found.base, found.sft, found.pivot))])
        return rows

    def as_text(self) -> str:
        parts = [aligned(self.rows(), left=(0,)), "\n".join(self.notes())]
        if self.suite.published:
            parts.append(aligned(self.published(), left=(0,)))
        return "\n\n".join(part for part in parts if part)

    def as_markdown(self) -> str:
        heads, *rows = self.rows()
        lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *([row[0].strip(), *row[1:]] for row in rows)]
        return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + ["", *self.notes()]).rstrip()

    def settings(self) -> dict[str, Any]:
        files = [file for model in self.models for file in model.files]
        return {"results": files, "benchmarks": self.benchmarks, "lmms_eval": self.suite.lmms_eval}

    def figures(self) -> dict[str, float]:
        """Shares for a tracker, as those of `table.figures`."""
        names = short_names(self.labels)
        found: dict[str, float] = {}
        for name, model in zip(names, self.models, strict=True):
            averages = {group: model.average(list(members)) for group, members in self.suite.groups.items()}
            averages["average"] = model.overall(self.suite)
            scores = averages | {benchmark: result.score for benchmark, result in model.results.items()}
            for benchmark, score in scores.items():
                if score is not None:
                    found |= figure(f"vqa/{benchmark}/{name}", score / 100, _interval(model.results.get(benchmark)))
        return found

    def as_json(self, **facts: Any) -> str:
        told = {
            "settings": self.settings(),
            **facts,
            "lmms_eval": self.suite.lmms_eval,
            "models": [self._record(*pair) for pair in zip(self.labels, self.models, strict=True)],
            "against_the_first": [
                self._differences(*pair) for pair in zip(self.labels[1:], self.models[1:], strict=True)
            ],
            "published": {encoder: asdict(found) for encoder, found in self.suite.published.items()},
        }
        return json.dumps(told, indent=2, default=str)

    def _record(self, label: str, model: ModelResults) -> dict[str, Any]:
        groups = {group: model.average(list(names)) for group, names in self.suite.groups.items()}
        found = {"scores": {name: asdict(result) for name, result in model.results.items()}, "missing": model.missing}
        return {
            "model": label,
            "files": model.files,
            **found,
            "groups": groups,
            "average": model.overall(self.suite),
            "other_tasks": model.others,
        }

    def _differences(self, label: str, model: ModelResults) -> dict[str, Any]:
        first, found = self.models[0].results, {}
        for name in first.keys() & model.results.keys():
            points, interval = change(first[name], model.results[name])
            found[name] = {"points": points, "interval": interval.as_record() if interval else None}
        return {"model": label, "scores": {name: found[name] for name in self.suite.benchmarks if name in found}}


def _interval(result: Result | None) -> Interval:
    """Of a share; without end where there is none."""
    found = result.interval if result else None
    return Interval(found.low / 100, found.high / 100) if found else Interval(-math.inf, math.inf)


def _percent(score: float | None) -> str:
    return NONE if score is None else f"{score:.2f}"


def _change(first: Result | None, other: Result | None) -> str:
    if first is None or other is None:
        return NONE
    points, interval = change(first, other)
    if interval is None:
        return f"{points:+.2f}"
    return change_text(points / 100, Interval(interval.low / 100, interval.high / 100))


def vqa_report(paths: Sequence[Path], benchmarks: Path) -> VqaReport:
    """`paths`: of each model, as `read_model` takes it."""
    suite = read_suite(benchmarks)
    return VqaReport(suite, tuple(read_model(path, suite) for path in paths), benchmarks)
