"""Which slice of which Hugging Face tensor belongs to which rank. Pure: tables and numbers, no files, no processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pivot_megatron.families import projector
from pivot_megatron.families.registry import ENCODERS, HEADS
from pivot_megatron.families.table import PadRows, Row, Transform, expand
from pivot_megatron.model.composition import Architecture

COMPONENTS = ("encoder", "projector", "llm")


@dataclass(frozen=True)
class Slice:
    """`[start, stop)` of a Hugging Face part along `dim`, then `zero_rows` of padding; the whole part where `dim` is None."""

    dim: int | None = None
    start: int = 0
    stop: int = 0
    zero_rows: int = 0


def slice_for(transform: Transform, length: int, rank: int, size: int) -> Slice:
    """The slice of a part that has `length` entries along the transform's `tp_dim`, for tensor-parallel `rank` of `size`."""
    dim = transform.tp_dim
    if dim is None:
        return Slice()
    padded = transform.padded if isinstance(transform, PadRows) else length
    if padded % size:
        raise ValueError(f"{padded} rows do not divide by tensor-parallel size {size}")
    width = padded // size
    start, stop = min(rank * width, length), min((rank + 1) * width, length)
    return Slice(dim, start, stop, zero_rows=width - (stop - start))


def component_rows(arch: Architecture, component: str) -> tuple[Row, ...]:
    """One row a parameter of `component` (names without its prefix), for the layers that are built."""
    if component == "encoder":
        rows = ENCODERS[arch.encoder.family].table(arch.encoder)
        return expand(rows, arch.encoder_layers)
    if component == "projector":
        return projector.table()
    if component == "llm":
        return expand(HEADS[arch.head.family].table(arch.head), arch.head.layers)
    raise ValueError(f"component: expected one of {', '.join(COMPONENTS)}, found {component}")


def rows_by_parameter(arch: Architecture) -> dict[str, Row]:
    """Every parameter's canonical global name, such as `llm.decoder.layers.3.mlp.linear_fc1.weight`, to its row."""
    return {f"{part}.{row.megatron}": row for part in COMPONENTS for row in component_rows(arch, part)}


def join(transform: Transform, shards: Sequence[Tensor]) -> list[Tensor]:
    """All ranks' shards, in rank order, to the whole Hugging Face parts: unfuse each, then join, then cut padding."""
    dim = transform.tp_dim
    if dim is None:
        return transform.unfuse(shards[0])
    parts = [torch.cat(pieces, dim=dim) for pieces in zip(*map(transform.unfuse, shards), strict=True)]
    return [part[: transform.rows] for part in parts] if isinstance(transform, PadRows) else parts
