"""The demo's training runs: `pivot train` on the shipped configs, with this folder's paths and this machine's precision."""

from __future__ import annotations

import json
from pathlib import Path

from pivot_megatron.config.load import load_config
from pivot_megatron.config.schema import RunConfig
from pivot_megatron.config.shipped import shipped_config
from pivot_megatron.errors import RunError
from pivot_megatron.recipe.demo_scale import DemoScale
from pivot_megatron.runtime.device import device_count
from pivot_megatron.runtime.launch import launch

CONFIGS = {
    "align": "demo/1a_align.yaml",
    "pretrain": "demo/1b_pretrain.yaml",
    "sft": "demo/2_sft.yaml",
    "dpo": "demo/2_dpo.yaml",
}
MODELS = {"base": "pretrain", "sft": "sft", "dpo": "dpo"}
"""The models that are compared, and the runs whose newest checkpoints they are."""

_STARTS = {"pretrain": "align", "sft": "pretrain", "dpo": "pretrain"}
_SHARDS = {"align": ("captions",), "pretrain": ("captions", "instruct"), "sft": ("pairs",), "dpo": ("pairs",)}


def train_run(name: str, out: Path, scale: DemoScale, processes: int) -> str:
    """Train a run of `CONFIGS` in `out/runs/NAME` to its end, going on from its own checkpoints. Returns its folder.

    Raises RunError if the processes fail; what they said stands on stderr.
    """
    arguments = ["train", str(shipped_config(CONFIGS[name])), *overrides(name, out, scale, processes)]
    if code := launch(_usable(processes), arguments):
        raise RunError(f"demo: the run `{name}` ended with exit code {code}; its folder is {run_folder(name, out)}")
    return str(run_folder(name, out))


def run_folder(name: str, out: Path) -> Path:
    return out / "runs" / name


def run_config(name: str, out: Path, scale: DemoScale, processes: int) -> RunConfig:
    return load_config(shipped_config(CONFIGS[name]), overrides(name, out, scale, processes))


def overrides(name: str, out: Path, scale: DemoScale, processes: int) -> list[str]:
    """What differs from the config: where things lie, what this machine computes in, how it is split, and test sizes."""
    paths: dict[str, Path | list[Path]] = {"out": run_folder(name, out)}
    if name in _STARTS:
        start = run_folder(_STARTS[name], out)
        paths |= {f"model.{part}.checkpoint": start for part in ("encoder", "llm", "projector")}
    else:
        paths |= {f"model.{part}.hf": out / "checkpoints" / part for part in ("encoder", "llm")}
    paths["data.shards"] = [out / "data" / kind for kind in _SHARDS[name]]
    # Quoted, since a folder's name may mean something else to YAML.
    found = [f"{key}={json.dumps(path, default=str)}" for key, path in paths.items()]
    found.append(f"precision.compute={'bf16' if device_count() else 'fp32'}")
    if _usable(processes) % 2:
        found.append("layout.pipeline=1")
    if scale.steps is not None:
        found += [f"batch.steps={scale.steps}", "batch.epochs=null", "checkpoints.every=1"]
    return found


def _usable(processes: int) -> int:
    """One process a GPU at most."""
    return min(processes, device_count() or processes)
