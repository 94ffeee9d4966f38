"""One table a family: how each megatron-core parameter is made of Hugging Face tensors, and how tensor parallelism splits it.

Import slices every Hugging Face part for a rank and then fuses; export unfuses every rank's shard and then joins the parts:
cutting a tensor that is already fused is wrong for more than one rank.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Padding:
    """`size` entries of a Hugging Face part, then zeros up to `padded`, the same for every layout."""

    size: int
    padded: int

    @classmethod
    def to_multiple(cls, size: int, multiple: int) -> Padding | None:
        padded = -(-size // multiple) * multiple
        return cls(size, padded) if padded > size else None


class Transform(Protocol):
    """`tp_dim`: the dimension that tensor parallelism splits in every part and in the fused tensor; None if replicated.
    `padding`: what each part is lengthened to along it. `most_ranks`: among how many parts can be split; where there are more
    ranks, each slice is fused first and then split. None if any number."""

    @property
    def tp_dim(self) -> int | None: ...

    @property
    def padding(self) -> Padding | None: ...

    @property
    def most_ranks(self) -> int | None: ...

    def fuse(self, parts: Sequence[Tensor]) -> Tensor:
        """One rank's slices of the Hugging Face parts into its megatron-core shard."""
        ...

    def unfuse(self, shard: Tensor) -> list[Tensor]:
        """The inverse of `fuse`."""
        ...


@dataclass(frozen=True)
class Copy:
    """One tensor under another name. `tp_dim` 0: column parallel; 1: row parallel; None: a copy on every rank."""

    tp_dim: int | None = None
    padding: Padding | None = None
    most_ranks: None = None

    def fuse(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0]

    def unfuse(self, shard: Tensor) -> list[Tensor]:
        return [shard]


@dataclass(frozen=True)
class Squeeze:
    """One tensor that has `dims` leading dimensions of size one more, as class tokens and position embeddings may."""

    dims: int

    tp_dim: None = None
    padding: None = None
    most_ranks: None = None

    def fuse(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0].reshape(parts[0].shape[self.dims :])

    def unfuse(self, shard: Tensor) -> list[Tensor]:
        return [shard[(None,) * self.dims]]


@dataclass(frozen=True)
class FuseQKV:
    """Query, key and value interleaved by group: `[groups, heads_per_group + 2, head_dim, ...]` flattened over the first three.

    Parts: query `[heads * head_dim, ...]`, key and value `[groups * head_dim, ...]`; weights `[rows, hidden]` or biases `[rows]`.
    """

    groups: int
    heads_per_group: int
    head_dim: int
    tp_dim: int = 0
    padding: None = None

    @property
    def most_ranks(self) -> int:
        return self.groups

    def fuse(self, parts: Sequence[Tensor]) -> Tensor:
        query, key, value = parts
        groups = key.shape[0] // self.head_dim
        rest = key.shape[1:]
        by_group = [part.reshape(groups, -1, *rest) for part in (query, key, value)]
        return torch.cat(by_group, dim=1).reshape(-1, *rest)

    def unfuse(self, shard: Tensor) -> list[Tensor]:
        rest = shard.shape[1:]
        by_group = shard.reshape(-1, (self.heads_per_group + 2) * self.head_dim, *rest)
        sizes = [self.heads_per_group * self.head_dim, self.head_dim, self.head_dim]
        return [part.reshape(-1, *rest) for part in by_group.split(sizes, dim=1)]


@dataclass(frozen=True)
class FuseGatedMLP:
    """Gate and up projections, each `[ffn, hidden]`, one above the other on each rank."""

    padding: Padding | None = None
    tp_dim: int = 0
    most_ranks: None = None

    def fuse(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts), dim=0)

    def unfuse(self, shard: Tensor) -> list[Tensor]:
        return list(shard.chunk(2, dim=0))


@dataclass(frozen=True)
class Row:
    """`megatron` and `hf` may hold `{layer}`, which stands for the same global layer index on both sides."""

    megatron: str
    hf: tuple[str, ...]
    transform: Transform

    def at(self, layer: int) -> Row:
        return Row(
            self.megatron.replace("{layer}", str(layer)),
            tuple(name.replace("{layer}", str(layer)) for name in self.hf),
            self.transform,
        )


def expand(rows: Sequence[Row], layers: int) -> tuple[Row, ...]:
    """Rows with `{layer}` once for each of `layers` layers, the others once."""
    return tuple(
        one
        for row in rows
        for one in ([row.at(layer) for layer in range(layers)] if "{layer}" in row.megatron else [row])
    )


# The norm before a linear stands alone in local layers and inside the linear in Transformer Engine's: one name in tables.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_bias": "input_layernorm.bias",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.layer_norm_bias": "pre_mlp_layernorm.bias",
}

# Checkpoints carry Transformer Engine's names on every platform, so that one made here loads there.
CHECKPOINT_NORM_KEYS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def canonical(name: str) -> str:
    """A parameter's name as tables spell it."""
    for fused, separate in FUSED_NORMS.items():
        if name.endswith(fused):
            return name.removesuffix(fused) + separate
    return name


def spellings(name: str, prefix: str, aliases: Sequence[tuple[str, str]]) -> list[str]:
    """Names under which a component's own folder may hold the hub's `name`: with `prefix` or without, and with each hub part
    of `aliases` (hub, other) spelled the other way."""
    other = name
    for hub, alias in aliases:
        other = other.replace(hub, alias)
    return [s for n in dict.fromkeys((name, other)) for s in (n, n.removeprefix(prefix), prefix + n)]


MASTERS = "optimizer.state.param."
"""What a checkpoint puts before a weight's key to name the float32 numbers behind it, which megatron-core's optimizer saves."""


def layer_key(key: str, layer: int) -> str:
    """Of a layer's tensor where it stands by itself, although its stack's `key` would hold all layers' in one."""
    return f"{key}.{layer}"


_LAYER = re.compile(r"(.*decoder\.layers\.)(\d+)\.(.*)")


def checkpoint_place(name: str) -> tuple[str, int | None]:
    """Under which key a checkpoint holds the parameter of canonical `name`, and which entry of the key's first axis it is;
    None where it stands in no layer. Layers of a stack lie in one tensor."""
    found = _LAYER.fullmatch(name)
    if found is None:
        return name, None
    stack, layer, rest = found[1], int(found[2]), found[3]
    for separate, fused in CHECKPOINT_NORM_KEYS.items():
        if rest.startswith(separate):
            rest = fused + rest.removeprefix(separate)
    return stack + rest, layer
