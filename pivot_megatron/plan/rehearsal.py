"""Every stage of a layout built as a run builds it, rank by rank in one process, and held against what plans count with."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from pivot_megatron.config.schema import Layout, ParameterRule, Precision, Recompute
from pivot_megatron.convert.load import parameters_by_global_name
from pivot_megatron.model.composition import Architecture, VisionLanguageModel, build_model
from pivot_megatron.plan.parameters import held
from pivot_megatron.plan.stages import Chunk, chunks
from pivot_megatron.quiet import quiet
from pivot_megatron.runtime.pretended import pretended_rank
from pivot_megatron.train.optimizer import apply_rules


@dataclass(frozen=True)
class Build:
    """A model as a run builds it on `gpus` processes, one a GPU. `rules`: which of its parameters train."""

    arch: Architecture
    layout: Layout
    gpus: int
    precision: Precision = field(default_factory=Precision)
    recompute: Recompute = field(default_factory=Recompute)
    rules: tuple[ParameterRule, ...] = ()


@dataclass(frozen=True)
class Facts:
    """Of one parameter, as a rank holds it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    trains: bool

    def __str__(self) -> str:
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}, {'trains' if self.trains else 'frozen'}"


@dataclass(frozen=True)
class StageFound:
    """A pipeline stage as it was built. `ranks`: that hold it, `built`: those of them that were. Of a rank: `parameters` and
    those that train, by count, and `weight_bytes`. `differences`: from what plans count with, one a line, each with its rank."""

    stage: int
    chunks: tuple[Chunk, ...]
    ranks: range
    built: tuple[int, ...]
    parameters: int
    training: int
    weight_bytes: int
    differences: tuple[str, ...]


def rehearse(build: Build) -> tuple[StageFound, ...]:
    """The first and the last rank of every stage. Ranks are counted as megatron-core does: tensor-parallel neighbours first, then
    data-parallel replicas, then stages; so those two differ in both, and between them no rank has anything of its own."""
    each = build.gpus // build.layout.pipeline
    return tuple(
        _stage(build, stage, range(stage * each, (stage + 1) * each)) for stage in range(build.layout.pipeline)
    )


def _stage(build: Build, stage: int, ranks: range) -> StageFound:
    own = tuple(chunk for chunk in chunks(build.arch.head.layers, build.layout) if chunk.stage == stage)
    built = tuple(dict.fromkeys((ranks[0], ranks[-1])))
    parameters: list[Facts] = []
    differences: list[str] = []
    for rank in built:
        try:
            parameters, found = _rank(build, own, rank)
        except Exception as error:  # whatever megatron-core raises of this layout is what was to be found out
            told = (str(error).splitlines() or [""])[0]
            found = [f"expected a model, found {type(error).__name__}: {told}"]
        differences += [f"rank {rank}: {one}" for one in found]
    training = sum(_count(one) for one in parameters if one.trains)
    weight_bytes = sum(_count(one) * one.dtype.itemsize for one in parameters)
    return StageFound(
        stage, own, ranks, built, sum(map(_count, parameters)), training, weight_bytes, tuple(differences)
    )


def _count(one: Facts) -> int:
    return torch.Size(one.shape).numel()


def _rank(build: Build, own: Sequence[Chunk], rank: int) -> tuple[list[Facts], list[str]]:
    """What `rank` holds, and each difference from what it should."""
    parameters: list[Facts] = []
    differences: list[str] = []
    # Transformer Engine alone computes in FP8, and keeps its weights in `compute`.
    plain = replace(build.precision, fp8=None)
    with pretended_rank(build.layout, rank, build.gpus):
        stage = build_model(build.arch, build.layout, plain, build.recompute)
        apply_rules(stage, build.rules)
        for model, chunk in zip(stage, own, strict=True):
            found = _found(model)
            parameters += found.values()
            differences += [*_layer_differences(model, chunk), *compared(_expected(build, chunk), found)]
    return parameters, differences


def _expected(build: Build, chunk: Chunk) -> dict[str, Facts]:
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[build.precision.compute]
    return {one.name: Facts(one.shape, dtype, one.trains) for one in held(build.arch, build.layout, chunk, build.rules)}


def _found(model: VisionLanguageModel) -> dict[str, Facts]:
    return {
        name: Facts(tuple(parameter.shape), parameter.dtype, parameter.requires_grad)
        for name, parameter in parameters_by_global_name([model])
    }


def _layer_differences(model: VisionLanguageModel, chunk: Chunk) -> Iterator[str]:
    found = [layer.layer_number - 1 for layer in model.llm.decoder.layers]
    if found != list(chunk.layers):
        yield f"chunk {chunk.chunk}: expected LLM layers {list(chunk.layers)}, found {found}"


def compared(expected: Mapping[str, Facts], found: Mapping[str, Facts]) -> Iterator[str]:
    """Each parameter that differs, by name."""
    for name in dict.fromkeys((*expected, *found)):
        wanted, other = expected.get(name), found.get(name)
        if wanted != other:
            yield f"{name}: expected {wanted or 'none'}, found {other or 'none'}"


def answer() -> None:
    """A `Build` from standard input, what was found of it to standard output, both pickled; what libraries print goes to the
    standard error."""
    quiet()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with answers:
        pickle.dump(rehearse(pickle.load(sys.stdin.buffer)), answers)
