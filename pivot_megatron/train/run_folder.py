"""A run's folder: resolved config, environment, and a line of metrics a step."""

from __future__ import annotations

import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from pivot_megatron.config.load import dump_config
from pivot_megatron.config.schema import RunConfig
from pivot_megatron.data.loader import Dropped
from pivot_megatron.errors import UserError
from pivot_megatron.requeue import mark_path
from pivot_megatron.runtime.kernels import Kernels

PACKAGES = ("pivot-megatron", "torch", "megatron-core", "transformers", "transformer-engine", "numpy", "safetensors")


def write_atomically(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """Versions, git state and hardware."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
        commit = described.stdout.strip() or None
    except OSError:  # no git on this machine
        commit = None
    return {
        "python": sys.version.split()[0],
        "packages": {name: installed_version(name) for name in PACKAGES},
        "git": commit,
        "machine": platform.machine(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
    }


def environment(device: str, world_size: int, kernels: Kernels) -> dict[str, Any]:
    """Of a run, for the record. `threads`: of this process."""
    return {
        **machine(),
        "device": device,
        "processes": world_size,
        "threads": torch.get_num_threads(),
        **asdict(kernels),
    }


class RunFolder:
    """Written by the main process alone."""

    def __init__(self, config: RunConfig) -> None:
        self.path = config.out
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.dropped = self.path / "dropped.jsonl"
        self._saving = 0.0
        self.faults = self.path / "faults.jsonl"
        self._stragglers = self.path / "stragglers.jsonl"

    def create(self, config: RunConfig, environment: Mapping[str, Any]) -> None:
        """Raises UserError where it cannot be written to."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / "config.yaml", dump_config(config))
            write_atomically(self.path / "environment.json", json.dumps(environment, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"out: cannot write to {self.path} ({error.strerror}); choose another folder") from None

    def rewind(self, step: int) -> None:
        """Drop lines of steps after `step`, which a run that resumes from there will write again."""
        for path in (self.metrics, self.dropped, self.faults, self._stragglers):
            if path.exists():
                lines = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
                write_atomically(path, "".join(line + "\n" for line in lines))

    def log(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """With `save_seconds`, for which checkpoints held up training since the line before. Returns it as it was written."""
        written: dict[str, Any] = _finite({**line, "save_seconds": self._saving})
        self._append(self.metrics, [written])
        self._saving = 0.0
        return written

    def last_step(self) -> int:
        """Of the newest line of metrics; 0 where there is none."""
        lines = self.metrics.read_text().splitlines() if self.metrics.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def described(self) -> dict[str, str]:
        """The texts of the resolved config (YAML) and of the environment (JSON), by name."""
        files = {"config": "config.yaml", "environment": "environment.json"}
        return {name: (self.path / file).read_text() for name, file in files.items()}

    def held_up(self, seconds: float) -> None:
        """By a checkpoint; the next line says so."""
        self._saving += seconds

    def means_since(self, step: int) -> dict[str, float]:
        """Each metric's mean over the lines of applied steps after `step`."""
        values: dict[str, list[float]] = {}
        for line in reversed(self.metrics.read_text().splitlines()):
            if _step_of(line) <= step:
                break
            found = json.loads(line)
            for name, value in found.items() if found["applied"] else ():
                if isinstance(value, int | float) and name not in ("step", "applied"):
                    values.setdefault(name, []).append(float(value))
        return {name: fmean(every) for name, every in values.items()}

    def log_fault(self, line: Mapping[str, Any]) -> None:
        self._append(self.faults, [line])

    def log_straggler(self, line: Mapping[str, Any]) -> None:
        self._append(self._stragglers, [line])

    def mark_for_requeue(self, step: int, asked: signal.Signals) -> None:
        """For whatever started the run to start it again. `step`: the newest that is saved."""
        self.path.mkdir(parents=True, exist_ok=True)
        mark = {"step": step, "signal": asked.name, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        write_atomically(mark_path(self.path), json.dumps(mark) + "\n")

    def mark_finished(self, step: int) -> None:
        """`step`: the run's last, which is saved."""
        write_atomically(finished_path(self.path), json.dumps({"step": step}) + "\n")

    def unmark_finished(self) -> None:
        """Of a run that has steps to make, whatever an earlier one said here."""
        finished_path(self.path).unlink(missing_ok=True)

    def log_dropped(self, step: int, dropped: Sequence[Dropped]) -> None:
        self._append(self.dropped, [{"step": step, **asdict(d)} for d in dropped])

    def bad_samples(self) -> set[int]:
        """Places in the set of the broken samples that were skipped so far."""
        lines = self.dropped.read_text().splitlines() if self.dropped.exists() else []
        return {row["index"] for row in map(json.loads, lines) if row["bad"]}

    def _append(self, path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
        with path.open("a") as file:
            file.writelines(json.dumps(_finite(line)) + "\n" for line in lines)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for both."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step_of(line: str) -> float:
    """The step a line belongs to; a line that a crash cut short belongs past every step."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return float("inf")


def finished_path(run: Path) -> Path:
    """The file that a run has once it has made all of its steps."""
    return run / "finished.json"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, oldest first."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
