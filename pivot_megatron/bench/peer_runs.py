"""A job run by either trainer in a process of its own, all of this machine's cores, or one of its GPUs, at its service."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import yaml

from pivot_megatron.bench.gemm import device_rate
from pivot_megatron.bench.peer_job import Setting, pivot_config, trl_job
from pivot_megatron.bench.watched import Watched, run_watched
from pivot_megatron.bench.world import World
from pivot_megatron.data.pair_set import PairSet
from pivot_megatron.data.reference import pass_seconds
from pivot_megatron.runtime.device import available_cores, device_count
from pivot_megatron.train.run_folder import read_metrics

_REFERENCE = "reference-*.parquet"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class PeerRun:
    """`steps`: the lines of metrics.jsonl. `peak_bytes`: up to the last step, of the process's resident memory, or on a GPU of
    its tensors there, as torch counts them. `threads` and `attention`: as the trainer itself found them. `reference_seconds`: a
    pair, where the reference is not part of the steps."""

    steps: Sequence[Mapping[str, Any]]
    watched: Watched
    peak_bytes: int
    threads: int
    attention: str
    reference_seconds: float = 0.0


def run_pivot(world: World, setting: Setting, out: Path) -> PeerRun:
    out.mkdir(parents=True)
    config = out / "run.yaml"
    config.write_text(yaml.safe_dump(pivot_config(world, setting, out / "run")))
    for made in world.pairs.glob(_REFERENCE):
        made.unlink()  # every run makes its own, so that every run measures it
    command = [sys.executable, "-m", "pivot_megatron.cli", "train", str(config), "--processes", "1"]
    run = _run(command, out / "run", setting, out / "log.txt", {})
    (reference,) = world.pairs.glob(_REFERENCE)
    pairs = len(PairSet.open([world.pairs]))
    return replace(run, reference_seconds=pass_seconds(reference) / pairs)


def run_trl(
    python: Path,
    world: World,
    setting: Setting,
    out: Path,
    variables: Mapping[str, str] = MappingProxyType({}),
    keep_batches: bool = False,
) -> PeerRun:
    """`variables`: of its environment, beside or in place of those that both sides have. `keep_batches` leaves what TRL's
    collator made in `out/batches`, a file a batch."""
    out.mkdir(parents=True)
    job = out / "job.json"
    job.write_text(
        json.dumps(trl_job(world, setting, out) | {"batches": str(out / "batches") if keep_batches else None})
    )
    # -P: the script's own folder stays off the path, where its neighbours would hide other packages of their names.
    command = [str(python), "-P", str(Path(__file__).with_name("trl_runner.py")), str(job)]
    return _run(command, out, setting, out / "log.txt", variables)


def rate_for(setting: Setting) -> Callable[[], float]:
    """What this machine multiplies matrices at, FLOP/s, in the setting's precision."""
    return partial(device_rate, _DTYPES[setting.precision])


def child_environment(inherited: Mapping[str, str], threads: int, gpus: int, more: Mapping[str, str]) -> dict[str, str]:
    """Both sides take their threads from here, whatever is `inherited`. Of several GPUs each sees the first alone: transformers
    would spread TRL's model over all of them. `more` is laid over it."""
    found = {**inherited, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    found |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    if gpus:
        found["CUDA_VISIBLE_DEVICES"] = inherited.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return {**found, **more}


def _run(command: Sequence[str], folder: Path, setting: Setting, log: Path, more: Mapping[str, str]) -> PeerRun:
    """`folder`: where the command writes its metrics.jsonl and its environment.json."""
    gpus = device_count()
    environment = child_environment(os.environ, setting.threads or available_cores(), gpus, more)
    metrics = folder / "metrics.jsonl"
    watched = run_watched(command, metrics, setting.steps, log, environment, rate_for(setting))
    steps = read_metrics(folder)
    told = json.loads((folder / "environment.json").read_text())
    peak = int(steps[-1]["peak_bytes"]) if gpus else watched.peak_bytes
    return PeerRun(steps, watched, peak, told["threads"], told["attention"])
