"""Where a training step's time goes on this machine, by kind of operation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from pivot_megatron.bench.peer_job import Setting, pivot_config
from pivot_megatron.bench.shapes import Shape
from pivot_megatron.bench.world import make_world
from pivot_megatron.config.load import load_config
from pivot_megatron.train.step import StepResult
from pivot_megatron.train.trainer import train

_WARM_UP = 2
_PROFILED = 2
# The first kind whose words an operator's name contains.
_KINDS: Mapping[str, tuple[str, ...]] = {
    "matrix products": ("::mm", "::addmm", "::bmm", "::baddbmm", "convolution"),
    "attention": ("scaled_dot_product",),
    "optimizer and gradient norm": ("adamw", "linalg_vector_norm", "Optimizer."),
}
_REST = "elementwise, copies, Python"


@dataclass(frozen=True)
class Profile:
    """Of the mean profiled step: seconds, and what share of it each kind of operator took by itself. The slowest operators:
    name, calls a step, share."""

    seconds: float
    shares: Mapping[str, float]
    operators: tuple[tuple[str, float, float], ...]


def profile_steps(shape: Shape, out: Path) -> Profile:
    """Train a few steps of `shape` in this process, in `out`, and look at those after the first ones."""
    setting = Setting(_WARM_UP + _PROFILED, shape.pairs_a_step)
    world = make_world(out, shape)
    config = out / "run.yaml"
    config.write_text(yaml.safe_dump(pivot_config(world, setting, out / "run")))
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def after(done: int, _total: int, _result: StepResult) -> None:
        if done == _WARM_UP:
            profiler.start()
        elif done == _WARM_UP + _PROFILED:
            profiler.stop()

    train(load_config(config), after)
    return summarise(profiler.key_averages(), _PROFILED)


def summarise(events: Any, steps: int) -> Profile:
    """`events`: torch.profiler's averages by operator, over `steps` steps."""
    total = sum(event.self_cpu_time_total for event in events)
    shares = dict.fromkeys([*_KINDS, _REST], 0.0)
    for event in events:
        shares[kind_of(event.key)] += event.self_cpu_time_total / total
    slowest = sorted(events, key=lambda event: -event.self_cpu_time_total)[:12]
    operators = tuple((e.key, e.count / steps, e.self_cpu_time_total / total) for e in slowest)
    return Profile(total / steps / 1e6, shares, operators)


def kind_of(operator: str) -> str:
    return next((kind for kind, words in _KINDS.items() if any(word in operator for word in words)), _REST)


def as_text(found: Profile) -> str:
    lines = [f"{found.seconds:.2f} s a step, {_PROFILED} steps after {_WARM_UP}", ""]
    lines += [f"{share:6.1%}  {kind}" for kind, share in found.shares.items()]
    lines += ["", "slowest operators, calls a step:"]
    lines += [f"{share:6.1%}  {calls:7.0f}  {name}" for name, calls, share in found.operators]
    return "\n".join(lines)
