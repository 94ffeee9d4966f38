"""The demo's training runs: `pivot train` on the shipped configs, with this folder's paths and this machine's precision."""

from __future__ import annotations

import json
from pathlib import Path

from pivot_megatron.config.load import load_config
from pivot_megatron.config.schema import RunConfig
from pivot_megatron.config.shipped import shipped_config
from pivot_megatron.errors import RunError
from pivot_megatron.recipe.demo_folder import Demo
from pivot_megatron.runtime.device import device_count
from pivot_megatron.runtime.launch import launch

CONFIGS = {
    "align": "demo/1a_align.yaml",
    "pretrain": "demo/1b_pretrain.yaml",
    "sft": "demo/2_sft.yaml",
    "dpo": "demo/2_dpo.yaml",
}
"""The shipped config of each run."""

_STARTS = {"pretrain": "align", "sft": "pretrain", "dpo": "pretrain"}
_SHARDS = {"align": ("captions",), "pretrain": ("captions", "instruct"), "sft": ("pairs",), "dpo": ("pairs",)}


def train_run(demo: Demo, name: str) -> str:
    """Train a run of `CONFIGS` to its end, going on from its own checkpoints. Returns its folder.

    Raises RunError if the processes fail; what they said stands on stderr.
    """
    arguments = ["train", str(shipped_config(CONFIGS[name])), *overrides(demo, name)]
    if code := launch(_usable(demo.processes), arguments):
        raise RunError(f"demo: the run `{name}` ended with exit code {code}; its folder is {demo.run(name)}")
    return str(demo.run(name))


def run_config(demo: Demo, name: str) -> RunConfig:
    return load_config(shipped_config(CONFIGS[name]), overrides(demo, name))


def overrides(demo: Demo, name: str) -> list[str]:
    """What differs from the config: where things lie, what this machine computes in, how it is split, and test sizes."""
    paths: dict[str, Path | list[Path]] = {"out": demo.run(name)}
    if name in _STARTS:
        start = demo.run(_STARTS[name])
        paths |= {f"model.{part}.checkpoint": start for part in ("encoder", "llm", "projector")}
    else:
        paths |= {"model.encoder.hf": demo.encoder, "model.llm.hf": demo.llm}
    paths["data.shards"] = [demo.data(kind) for kind in _SHARDS[name]]
    # Quoted, since a folder's name may mean something else to YAML.
    found = [f"{key}={json.dumps(path, default=str)}" for key, path in paths.items()]
    found.append(f"precision.compute={'bf16' if device_count() else 'fp32'}")
    if _usable(demo.processes) % 2:
        found += ["layout.tensor=1", "layout.pipeline=1"]
    if demo.scale.steps is not None:
        found += [f"batch.steps={demo.scale.steps}", "batch.epochs=null", "checkpoints.every=1"]
    return found


def _usable(processes: int) -> int:
    """One process a GPU at most."""
    return min(processes, device_count() or processes)
