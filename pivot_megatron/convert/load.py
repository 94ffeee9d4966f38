"""Weights into a model stage: each rank reads only its own slices, from a Hugging Face folder or a seeded generator."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial, reduce
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from pivot_megatron.convert.hf import HfTensors, read_json
from pivot_megatron.convert.plan import (
    Slice,
    component_rows,
    parameter_shape,
    part_shapes,
    rows_by_parameter,
    slice_for,
)
from pivot_megatron.convert.positions import ResizedPositions
from pivot_megatron.convert.stream import Parameter
from pivot_megatron.errors import UserError
from pivot_megatron.families.registry import ENCODERS, HEADS, encoder_architecture
from pivot_megatron.families.table import Row, canonical, spellings
from pivot_megatron.model.composition import Architecture, Stage, VisionLanguageModel
from pivot_megatron.runtime.distributed import tensor_parallel_coordinates
from pivot_megatron.runtime.masters import set_weight


def parameters_by_global_name(stage: Iterable[VisionLanguageModel]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """A stage's parameters under canonical names with global layer numbers.

    The copy of tied embeddings on a last stage of its own is named as what it copies.
    """
    for model in stage:
        yield from _parameters_of_chunk(model)


def _parameters_of_chunk(model: VisionLanguageModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    tied = model.arch.head.tied_embeddings
    for name, parameter in model.named_parameters():
        if tied and name == "llm.output_layer.weight":
            name = "llm.embedding.word_embeddings.weight"
        yield global_name(model, name), parameter


def global_name(model: VisionLanguageModel, name: str) -> str:
    """The canonical name, with the global layer number, of what is `name` in `model`, a chunk of a stage: a parameter or a
    module."""
    first_llm_layer = model.llm.decoder.layers[0].layer_number - 1 if len(model.llm.decoder.layers) else 0
    local = "llm.decoder.layers."
    if name.startswith(local):
        layer, dot, rest = name.removeprefix(local).partition(".")
        name = f"{local}{int(layer) + first_llm_layer}{dot}{rest}"
    return canonical(name)


class Source(Protocol):
    """Where Hugging Face parts come from."""

    @property
    def where(self) -> str: ...

    def dtype(self, name: str) -> torch.dtype: ...

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

    where = "fresh weights"

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str, part: Slice) -> Tensor:
        whole = self._draw(name, self._shapes[name])
        return whole if part.dim is None else whole.narrow(part.dim, part.start, part.stop - part.start)

    def _draw(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("bias"):
            return torch.zeros(shape)
        if "norm" in name or "layer_scale" in name:
            return torch.ones(shape)
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        if name == "image_newline":  # as LLaVA-OneVision draws it
            return torch.randn(shape, generator=generator) / math.sqrt(shape[0])
        if name.startswith("multi_modal_projector."):
            bound = 1 / math.sqrt(shape[1])
            return torch.rand(shape, generator=generator) * 2 * bound - bound
        return torch.randn(shape, generator=generator) * 0.02


def _family(arch: Architecture, component: str) -> Any:
    return ENCODERS[arch.encoder.family] if component == "encoder" else HEADS[arch.head.family]


def hf_tensors_of(arch: Architecture, component: str, folder: Path) -> HfTensors:
    """The folder's tensors. Raises UserError where they are not those that its config.json speaks of."""
    family = _family(arch, component)
    tensors = HfTensors(folder, partial(spellings, prefix=family.HF_PREFIX, aliases=family.ALIASES))
    require_whole(
        arch,
        {component: tensors},
        lambda name: may_be_left(arch, component, name.removeprefix(family.HF_PREFIX)),
    )
    return tensors


def hf_source(arch: Architecture, component: str, folder: Path) -> Source:
    """The folder's tensors, an encoder's positions at `arch`'s resolution. Raises UserError where they are not those that its
    config.json speaks of."""
    config = folder / "config.json"
    tensors = hf_tensors_of(arch, component, folder)
    return at_resolution(arch, tensors, read_json(config), str(config)) if component == "encoder" else tensors


def at_resolution(arch: Architecture, tensors: HfTensors, config: Mapping[str, Any], where: str) -> Source:
    """An encoder's tensors, positions resized where its own `config` has another resolution than `arch`."""
    encoder = arch.encoder
    if encoder.native or encoder_architecture(config, where).image_size == encoder.image_size:
        return tensors
    (name,) = rows_by_parameter(arch)["encoder.position_embedding.weight"].hf
    return ResizedPositions(tensors, name, encoder.places - encoder.tokens, encoder.grid)


def require_whole(arch: Architecture, tensors: Mapping[str, HfTensors], may_be_left: Callable[[str], bool]) -> None:
    """Raises UserError naming a tensor that config.json promises and the folder lacks, past the features too, one that it does
    not speak of, or one that it says is another's copy and is not.

    `tensors`: the folder's, by component. `may_be_left`: of a name in the folder, whether it may stand there unused.
    """
    every_layer = dataclasses.replace(arch, feature_layer=-1)
    used = set().union(*(found.holding(part_shapes(every_layer, name)) for name, found in tensors.items()))
    folder, *_ = tensors.values()
    for name in folder.names():
        if name not in used and not may_be_left(name):
            raise UserError(
                f"{folder.folder}: found a tensor {name} that config.json does not speak of; are the two of one model?"
            )
    if arch.head.tied_embeddings and "llm" in tensors:
        _require_tied(tensors["llm"])


def _require_tied(tensors: HfTensors) -> None:
    """A file may hold tied embeddings twice, but not two that differ."""
    words, output = "model.embed_tokens.weight", "lm_head.weight"
    if not tensors.has(output):
        return
    rows, *_ = shape = tensors.shape(words)
    cuts = (
        Slice(0, first, min(first + 4096, rows)) for first in range(0, rows, 4096)
    )  # never two whole ones in memory
    if shape != tensors.shape(output) or not all(
        torch.equal(tensors.read(words, cut).float(), tensors.read(output, cut).float()) for cut in cuts
    ):
        raise UserError(
            f"{tensors.folder}: {output}: expected {words} again, as config.json says tie_word_embeddings, found other numbers; "
            "set that to false to keep both"
        )
    tensors.release()


def may_be_left(arch: Architecture, component: str, name: str) -> bool:
    """Whether a tensor that no parameter is made of, by its name without the family's prefix, is one that may stand there."""
    family = _family(arch, component)
    if component == "llm":
        return name.endswith(family.UNUSED) or (arch.head.tied_embeddings and name == "lm_head.weight")
    return name.startswith((*family.ELSEWHERE, *family.PAST_FEATURES))


def load_component(model: Stage, component: str, source: Source) -> None:
    """Set this stage's parameters of `component` from `source`. Raises UserError on a missing tensor or a wrong shape."""
    rank, size = tensor_parallel_coordinates()
    rows, shapes = rows_by_parameter(model.arch), part_shapes(model.arch, component)
    for name, parameter in parameters_by_global_name(model):
        if name.startswith(component + "."):
            check_shapes(rows[name], source, shapes)
            set_weight(parameter, shard_of(rows[name], source, rank, size))


def check_shapes(row: Row, source: Source, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError where a part of `row` is missing in `source` or has another shape than `shapes` say."""
    for part in row.hf:
        if (found := source.shape(part)) != shapes[part]:
            raise UserError(
                f"{source.where}: {part}: expected shape {shapes[part]}, found {found}; config.json and the weights disagree"
            )


def shard_of(row: Row, source: Source, rank: int, size: int) -> Tensor:
    """One rank's megatron-core shard of `row`'s parameter."""
    parts = []
    dim, most = row.transform.tp_dim, row.transform.most_ranks
    sharing = 1 if most is None else max(1, size // most)  # ranks that split one fused slice among them
    for name in row.hf:
        length = source.shape(name)[dim] if dim is not None else 0
        cut = slice_for(row.transform, length, rank // sharing, size // sharing)
        part = source.read(name, cut)
        parts.append(_lengthened(part, cut) if cut.zeros else part)
    fused = row.transform.fuse(parts)
    return fused if sharing == 1 else fused.chunk(sharing, dim or 0)[rank % sharing]


def _lengthened(part: Tensor, cut: Slice) -> Tensor:
    """`part` with the slice's zeros behind it."""
    after = [0, 0] * part.dim()
    after[2 * (part.dim() - 1 - (cut.dim or 0)) + 1] = cut.zeros  # torch counts dimensions from the last
    return pad(part, after)


def component_parameters(arch: Architecture, component: str, source: Source | None, seed: int) -> list[Parameter]:
    """Whole parameters of `component`, to be made one by one; without a `source` they start fresh from `seed`.

    Raises UserError for a part that is missing or has another shape than the config says.
    """
    shapes = part_shapes(arch, component)
    parts: Source = source or FreshParts(shapes, seed)
    layers = arch.encoder_layers if component == "encoder" else arch.head.layers
    found = []
    for row in component_rows(arch, component):
        check_shapes(row, parts, shapes)
        name = f"{component}.{row.megatron}"
        make = partial(_made, row, parts)
        dtype = reduce(torch.promote_types, map(parts.dtype, row.hf))  # in which parts of several are put together
        found.append(Parameter(name, parameter_shape(arch, name), dtype, layers, make))
    return found


def _made(row: Row, source: Source) -> Tensor:
    made = shard_of(row, source, 0, 1)
    if isinstance(source, HfTensors):
        source.release()  # what `made` does not hold of the mapped file itself is let go
    return made
