"""The parts of the GPU check, as data, in the order in which to learn what works."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tests.gpu.rows import Row


@dataclass(frozen=True)
class Part:
    """`module` below `tests.gpu` has `rows()`. `seconds`: its time limit. `environment`: of the process that it runs in."""

    name: str
    about: str
    module: str
    seconds: int
    needs_cuda: bool = True
    local_layers: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


# cuBLAS would otherwise compute fp32 products of Transformer Engine's layers in TF32.
_FP32 = {"NVIDIA_TF32_OVERRIDE": "0"}

PARTS = (
    Part("build", "Transformer Engine's linear, FP8, FusedAdam, attention", "part_build", 180),
    Part("attention", "packed attention on every kernel against torch's in fp32", "part_attention", 240),
    Part("parity-local", "megatron-core's layers against transformers", "part_parity", 240, True, True, _FP32),
    Part("parity", "this machine's layers against transformers", "part_parity", 240, False, environment=_FP32),
    Part("checkpoints", "a run that stops and goes on", "part_checkpoints", 240, False),
    Part("fp8", "50 steps of each FP8 recipe against bf16", "part_fp8", 480, False),
    Part("sizes", "time, MFU and memory at true sizes", "part_sizes", 540, False),
    Part("dali", "JPEGs decoded by DALI against the torch backend", "part_dali", 120, False),
)


def part_by_name(name: str) -> Part:
    """Raises KeyError."""
    return {part.name: part for part in PARTS}[name]


def rows_of(part: Part) -> Iterable[Row]:
    """In this process, which must have run no other part that wants other layers or another environment."""
    if part.local_layers:
        from tests.gpu.machine import without_transformer_engine

        without_transformer_engine()
    rows: Iterable[Row] = importlib.import_module(f"tests.gpu.{part.module}").rows()
    return rows


def environment_of(part: Part) -> dict[str, str]:
    return {**os.environ, **part.environment, "TRANSFORMERS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
