"""Weights into a model stage: each rank reads only its own slices, from a Hugging Face folder or a seeded generator."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from pivot_megatron.config.schema import Layout
from pivot_megatron.convert.hf import HfTensors
from pivot_megatron.convert.plan import Slice, rows_by_parameter, slice_for
from pivot_megatron.errors import UserError
from pivot_megatron.families.registry import ENCODERS, HEADS
from pivot_megatron.families.table import Row, canonical
from pivot_megatron.model.composition import Architecture, VisionLanguageModel
from pivot_megatron.runtime.distributed import tensor_parallel_coordinates


def parameters_by_global_name(model: VisionLanguageModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This stage's parameters under canonical names with global layer numbers.

    The copy of tied embeddings on a last stage of its own is named as what it copies.
    """
    first_llm_layer = model.llm.decoder.layers[0].layer_number - 1 if len(model.llm.decoder.layers) else 0
    local, tied = "llm.decoder.layers.", model.arch.head.tied_embeddings
    for name, parameter in model.named_parameters():
        if name.startswith(local):
            layer, rest = name.removeprefix(local).split(".", 1)
            name = f"{local}{int(layer) + first_llm_layer}.{rest}"
        if tied and name == "llm.output_layer.weight":
            name = "llm.embedding.word_embeddings.weight"
        yield canonical(name), parameter


class Source(Protocol):
    """Where Hugging Face parts come from."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, part: Slice) -> Tensor: ...


class FreshParts:
    """Random parts, a function of seed and name alone: the same weights under every layout.

    Norm scales are one and biases zero. Projector linears are drawn as torch.nn.Linear's own default (uniform within
    1/sqrt(fan-in)), everything else from a normal with standard deviation 0.02, Hugging Face's default.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
        self._shapes = shapes
        self._seed = seed

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str, part: Slice) -> Tensor:
        whole = self._draw(name, self._shapes[name])
        return whole if part.dim is None else whole.narrow(part.dim, part.start, part.stop - part.start)

    def _draw(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("bias"):
            return torch.zeros(shape)
        if "norm" in name:
            return torch.ones(shape)
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        if name.startswith("multi_modal_projector."):
            bound = 1 / math.sqrt(shape[1])
            return torch.rand(shape, generator=generator) * 2 * bound - bound
        return torch.randn(shape, generator=generator) * 0.02


def hf_source(arch: Architecture, component: str, folder: Path) -> HfTensors:
    families = {"encoder": (ENCODERS, arch.encoder.family), "llm": (HEADS, arch.head.family)}
    table, family = families[component]
    return HfTensors(folder, prefixes=(table[family].HF_PREFIX,))


def hf_shapes(model: VisionLanguageModel, component: str) -> dict[str, tuple[int, ...]]:
    """Whole shapes of the Hugging Face parts of this stage's `component`, from its shards' shapes."""
    size = tensor_parallel_coordinates()[1]
    rows = rows_by_parameter(model.arch)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in parameters_by_global_name(model):
        if not name.startswith(component + "."):
            continue
        row = rows[name]
        for part_name, part in zip(row.hf, row.transform.unfuse(parameter.detach()), strict=True):
            shape = list(part.shape)
            if row.transform.tp_dim is not None:
                shape[row.transform.tp_dim] *= size
            if "embed_tokens" in part_name or part_name.startswith("lm_head"):
                shape[0] = model.arch.head.vocabulary
            shapes[part_name] = tuple(shape)
    return shapes


@torch.no_grad()
def load_component(model: VisionLanguageModel, component: str, source: Source) -> None:
    """Set this stage's parameters of `component` from `source`. Raises UserError on a missing tensor or a wrong shape."""
    rank, size = tensor_parallel_coordinates()
    rows = rows_by_parameter(model.arch)
    for name, parameter in parameters_by_global_name(model):
        if name.startswith(component + "."):
            shard = _shard(rows[name], source, rank, size)
            if shard.shape != parameter.shape:
                raise UserError(
                    f"{', '.join(rows[name].hf)}: expected a shard of shape {tuple(parameter.shape)} for {name}, "
                    f"found {tuple(shard.shape)}; config.json and the weights disagree"
                )
            parameter.copy_(shard)


def _shard(row: Row, source: Source, rank: int, size: int) -> Tensor:
    parts = []
    for name in row.hf:
        dim = row.transform.tp_dim
        cut = slice_for(row.transform, source.shape(name)[dim] if dim is not None else 0, rank, size)
        part = source.read(name, cut)
        parts.append(pad(part, (0, 0, 0, cut.zero_rows)) if cut.zero_rows else part)
    return row.transform.fuse(parts)


def check_layout_fits(arch: Architecture, layout: Layout) -> None:
    """Raises UserError with every reason why `arch` cannot be split so."""
    uneven = [
        f"{what} ({count})"
        for what, count in (
            ("encoder heads", arch.encoder.heads),
            ("encoder FFN width", arch.encoder.ffn),
            ("LLM heads", arch.head.heads),
            ("LLM key-value groups", arch.head.groups),
            ("LLM FFN width", arch.head.ffn),
        )
        if count % layout.tensor
    ]
    if uneven:
        raise UserError(f"layout.tensor: {', '.join(uneven)} must divide by it, found {layout.tensor}")
    stated = [n for n in (layout.first_stage_layers, layout.last_stage_layers) if n is not None]
    rest, stages = arch.head.layers - sum(stated), layout.pipeline - len(stated)
    if (stages and (rest % stages or rest < stages)) or (not stages and rest) or any(n < 1 for n in stated):
        raise UserError(
            f"layout.pipeline: the LLM's {arch.head.layers} layers do not fall evenly on {layout.pipeline} stages with "
            f"first_stage_layers {layout.first_stage_layers} and last_stage_layers {layout.last_stage_layers}: "
            f"{rest} layers would be left for {stages} stages; every stage needs one at least"
        )
    if not 0 < arch.encoder_layers <= arch.encoder.layers:
        raise UserError(
            f"model.encoder.feature_layer: the encoder has {arch.encoder.layers} layers, found {arch.feature_layer}"
        )
