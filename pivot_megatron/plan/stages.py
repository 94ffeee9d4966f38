"""Which chunk of a pipeline holds what, as megatron-core places it. Pure: numbers, no processes."""

from __future__ import annotations

from dataclasses import dataclass

from pivot_megatron.config.schema import Layout
from pivot_megatron.model.fit import stages_problem


@dataclass(frozen=True)
class Chunk:
    """One of a pipeline stage's chunks. `layers`: which of the LLM's, by global index. `first`: word embeddings, encoder and
    projector stand in it; `last`: the final norm and the output layer."""

    stage: int
    chunk: int
    layers: range
    first: bool
    last: bool


def chunks(layers: int, layout: Layout) -> tuple[Chunk, ...]:
    """By stage, then chunk: `layout.pipeline * layout.virtual_pipeline` of them, which hold `layers` layers between them.

    A micro-batch goes through every stage's first chunk, then through every stage's second, and so on. Raises ValueError where
    the layers do not fall so (`model.fit` says it to users, and what would do).
    """
    if problem := stages_problem(layers, layout):
        raise ValueError(problem)
    shares = [share // layout.virtual_pipeline for share in _stage_layers(layers, layout)]
    found = []
    for stage, share in enumerate(shares):
        for chunk in range(layout.virtual_pipeline):
            before = chunk * sum(shares) + sum(shares[:stage])
            first = stage == chunk == 0
            last = (stage, chunk) == (layout.pipeline - 1, layout.virtual_pipeline - 1)
            found.append(Chunk(stage, chunk, range(before, before + share), first, last))
    return tuple(found)


def _stage_layers(layers: int, layout: Layout) -> list[int]:
    """Of each stage: what is stated of the first and the last, and an even share of the rest."""
    first, last = layout.first_stage_layers, layout.last_stage_layers
    stated = (first or 0) + (last or 0)
    between = layout.pipeline - (first is not None) - (last is not None)
    even = (layers - stated) // between if between else 0
    return [*([] if first is None else [first]), *[even] * between, *([] if last is None else [last])]
