"""Which parameters a rank holds, and of what shape, by the tables that weights are converted by. Pure: numbers, no processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from pivot_megatron.config.schema import Layout, ParameterRule
from pivot_megatron.convert.plan import parameter_shape, rows_by_parameter
from pivot_megatron.families.table import checkpoint_place
from pivot_megatron.model.composition import Architecture
from pivot_megatron.model.freeze import rate_of
from pivot_megatron.plan.stages import Chunk

_WORDS = "llm.embedding.word_embeddings.weight"
_POSITIONS = "encoder.position_embedding.weight"


@dataclass(frozen=True)
class Held:
    """A parameter as one tensor-parallel rank of a chunk holds it: canonical global name, local shape, whether it trains."""

    name: str
    shape: tuple[int, ...]
    trains: bool

    @property
    def count(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class _Whole:
    """A parameter of the model. `split`: the dimension that tensor parallelism cuts, `layer`: its global index; either None
    where there is none."""

    name: str
    shape: tuple[int, ...]
    split: int | None
    layer: int | None


def held(arch: Architecture, layout: Layout, chunk: Chunk, rules: Sequence[ParameterRule] = ()) -> tuple[Held, ...]:
    """Every parameter of `chunk`, in the order of the tables; the same of each tensor-parallel rank, since padding is part of
    the whole.

    A last chunk that is not the first holds tied word embeddings once more, as its `llm.output_layer.weight`, under the name of
    what it copies: so `convert.load.parameters_by_global_name` has it. Raises ValueError where a parameter does not divide by
    `layout.tensor` (`model.fit` says it to users, and what would do).
    """
    return tuple(
        Held(whole.name, _local_shape(whole, layout.tensor), _trains(arch, whole.name, rules))
        for whole in _parameters(arch)
        if _stands_in(chunk, whole, arch.head.tied_embeddings)
    )


@lru_cache(maxsize=8)
def _parameters(arch: Architecture) -> tuple[_Whole, ...]:
    return tuple(
        _Whole(name, parameter_shape(arch, name), row.transform.tp_dim, checkpoint_place(name)[1])
        for name, row in rows_by_parameter(arch).items()
    )


def _local_shape(whole: _Whole, tensor: int) -> tuple[int, ...]:
    if whole.split is None:
        return whole.shape
    length = whole.shape[whole.split]
    if length % tensor:
        raise ValueError(f"{whole.name}: {length} entries do not divide by tensor-parallel size {tensor}")
    return tuple(length // tensor if dim == whole.split else n for dim, n in enumerate(whole.shape))


def _stands_in(chunk: Chunk, whole: _Whole, tied: bool) -> bool:
    if not whole.name.startswith("llm."):
        return chunk.first
    if whole.name == _WORDS:
        return chunk.first or (chunk.last and tied)
    return chunk.last if whole.layer is None else whole.layer in chunk.layers


def _trains(arch: Architecture, name: str, rules: Sequence[ParameterRule]) -> bool:
    constant = name == _POSITIONS and arch.encoder.fixed_positions
    return rate_of(name, rules) != "frozen" and not constant
