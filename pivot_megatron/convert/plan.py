"""Which slice of which Hugging Face tensor belongs to which rank. Pure: tables and numbers, no files, no processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pivot_megatron.families import projector
from pivot_megatron.families.architecture import EncoderArchitecture
from pivot_megatron.families.registry import ENCODERS, HEADS
from pivot_megatron.families.table import Row, Transform, expand
from pivot_megatron.model.composition import Architecture

COMPONENTS = ("encoder", "projector", "llm")


@dataclass(frozen=True)
class Slice:
    """`[start, stop)` of a Hugging Face part along `dim`, then `zeros` entries of padding; the whole part where `dim` is None."""

    dim: int | None = None
    start: int = 0
    stop: int = 0
    zeros: int = 0


def slice_for(transform: Transform, length: int, rank: int, size: int) -> Slice:
    """The slice of a part that has `length` entries along the transform's `tp_dim`, for tensor-parallel `rank` of `size`."""
    dim = transform.tp_dim
    if dim is None:
        return Slice()
    padded = transform.padding.padded if transform.padding else length
    if padded % size:
        raise ValueError(f"{padded} entries do not divide by tensor-parallel size {size}")
    width = padded // size
    start, stop = min(rank * width, length), min((rank + 1) * width, length)
    return Slice(dim, start, stop, zeros=width - (stop - start))


def component_rows(arch: Architecture, component: str) -> tuple[Row, ...]:
    """One row a parameter of `component` (names without its prefix), for the layers that are built."""
    if component == "encoder":
        rows = ENCODERS[arch.encoder.family].table(arch.encoder)
        built = [row for row in rows if arch.final_norm or not row.megatron.startswith("final_norm.")]
        return expand(built, arch.encoder_layers)
    if component == "projector":
        return projector.table(newline=arch.anyres is not None)
    if component == "llm":
        return expand(HEADS[arch.head.family].table(arch.head), arch.head.layers)
    raise ValueError(f"component: expected one of {', '.join(COMPONENTS)}, found {component}")


def rows_by_parameter(arch: Architecture) -> dict[str, Row]:
    """Every parameter's canonical global name, such as `llm.decoder.layers.3.mlp.linear_fc1.weight`, to its row."""
    return {f"{part}.{row.megatron}": row for part in COMPONENTS for row in component_rows(arch, part)}


def join(transform: Transform, shards: Sequence[Tensor]) -> list[Tensor]:
    """All ranks' shards, in rank order, to the whole Hugging Face parts: unfuse each, then join, then cut padding."""
    dim, most = transform.tp_dim, transform.most_ranks
    if dim is None:
        return transform.unfuse(shards[0])
    if most is not None and len(shards) > most:
        each = len(shards) // most
        shards = [torch.cat(list(shards[i : i + each]), dim=dim) for i in range(0, len(shards), each)]
    parts = [torch.cat(pieces, dim=dim) for pieces in zip(*map(transform.unfuse, shards), strict=True)]
    return [part.narrow(dim, 0, transform.padding.size) for part in parts] if transform.padding else parts


def parameter_shape(arch: Architecture, name: str) -> tuple[int, ...]:
    """Of a whole parameter, by its canonical name and the numbers of `arch` alone."""
    component, rest = name.split(".", 1)
    if component == "projector":
        wide, width = arch.encoder.hidden, arch.head.hidden
        shapes = {"linear_fc1.weight": (width, wide), "linear_fc2.weight": (width, width)}
        return shapes.get(rest.removeprefix("encoder."), (width,))
    encoder, head = arch.encoder, arch.head
    if component == "encoder":
        sizes = _Sizes(
            encoder.hidden, encoder.heads, encoder.heads, encoder.head_dim, encoder.padded_ffn, encoder.gated
        )
    else:
        sizes = _Sizes(head.hidden, head.heads, head.groups, head.head_dim, head.ffn, gated=True)
    whole = {
        "patch_embedding.weight": (encoder.hidden, *_patch(encoder)),
        "position_embedding.weight": (encoder.places, encoder.hidden),
        "class_token": (encoder.hidden,),
        "embedding.word_embeddings.weight": (head.padded_vocabulary, head.hidden),
        "output_layer.weight": (head.padded_vocabulary, head.hidden),
    }
    return whole.get(rest) or sizes.of(rest)


def _patch(encoder: EncoderArchitecture) -> tuple[int, ...]:
    edge = encoder.patch_size
    return (3 * edge**2,) if encoder.native else (3, edge, edge)


@dataclass(frozen=True)
class _Sizes:
    hidden: int
    heads: int
    groups: int
    head_dim: int
    ffn: int
    gated: bool

    def of(self, name: str) -> tuple[int, ...]:
        """Of a parameter of a layer; everything that is no matrix has the width of the model."""
        rows = {
            "self_attention.linear_qkv": (self.heads + 2 * self.groups) * self.head_dim,
            "self_attention.q_layernorm": self.head_dim,
            "self_attention.k_layernorm": self.head_dim,
            "mlp.linear_fc1": (2 if self.gated else 1) * self.ffn,
        }
        columns = {
            "self_attention.linear_qkv": self.hidden,
            "self_attention.linear_proj": self.heads * self.head_dim,
            "mlp.linear_fc1": self.hidden,
            "mlp.linear_fc2": self.ffn,
        }
        module, kind = name.rsplit(".", 1)
        where = ".".join(module.split(".")[-2:])
        shape = (rows.get(where, self.hidden),)
        return (*shape, columns[where]) if kind == "weight" and where in columns else shape


def part_shapes(arch: Architecture, component: str) -> dict[str, tuple[int, ...]]:
    """Whole shapes of the Hugging Face parts of `component`, by the numbers of `arch` alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for row in component_rows(arch, component):
        whole = torch.empty(parameter_shape(arch, f"{component}.{row.megatron}"), device="meta")
        parts = join(row.transform, [whole])
        shapes |= {name: tuple(part.shape) for name, part in zip(row.hf, parts, strict=True)}
    return shapes
