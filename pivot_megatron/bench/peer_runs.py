"""A job run by either trainer in a process of its own, all of this machine's cores at its service."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from pivot_megatron.bench.peer_job import Setting, pivot_config, trl_job
from pivot_megatron.bench.watched import Watched, run_watched
from pivot_megatron.bench.world import World
from pivot_megatron.data.pair_set import PairSet
from pivot_megatron.data.reference import pass_seconds
from pivot_megatron.train.run_folder import read_metrics

_REFERENCE = "reference-*.parquet"


@dataclass(frozen=True)
class PeerRun:
    """`steps`: the lines of metrics.jsonl. `reference_seconds`: a pair, where the reference is not part of the steps."""

    steps: Sequence[Mapping[str, Any]]
    watched: Watched
    reference_seconds: float = 0.0


def run_pivot(world: World, setting: Setting, out: Path) -> PeerRun:
    out.mkdir(parents=True)
    config = out / "run.yaml"
    config.write_text(yaml.safe_dump(pivot_config(world, setting, out / "run")))
    for made in world.pairs.glob(_REFERENCE):
        made.unlink()  # every run makes its own, so that every run measures it
    command = [sys.executable, "-m", "pivot_megatron.cli", "train", str(config), "--processes", "1"]
    run = _run(command, out / "run" / "metrics.jsonl", setting, out)
    (reference,) = world.pairs.glob(_REFERENCE)
    pairs = len(PairSet.open([world.pairs]))
    return replace(run, reference_seconds=pass_seconds(reference) / pairs)


def run_trl(python: Path, world: World, setting: Setting, out: Path, keep_batches: bool = False) -> PeerRun:
    """`keep_batches` leaves what TRL's collator made in `out/batches`, a file a batch."""
    out.mkdir(parents=True)
    job = out / "job.json"
    job.write_text(
        json.dumps(trl_job(world, setting, out) | {"batches": str(out / "batches") if keep_batches else None})
    )
    # -P: the script's own folder stays off the path, where its neighbours would hide other packages of their names.
    command = [str(python), "-P", str(Path(__file__).with_name("trl_runner.py")), str(job)]
    return _run(command, out / "metrics.jsonl", setting, out)


def _run(command: Sequence[str], metrics: Path, setting: Setting, out: Path) -> PeerRun:
    environment = {**os.environ} | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    watched = run_watched(command, metrics, setting.steps, out / "log.txt", environment)
    return PeerRun(read_metrics(metrics.parent), watched)
