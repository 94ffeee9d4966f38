"""Which layouts a plan looks at: all that the model can be cut by, and of uneven pipelines those that could be even in time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from pivot_megatron.config.schema import Layout, Precision
from pivot_megatron.model.composition import Architecture
from pivot_megatron.model.fit import misfits

_VIRTUAL = (1, 2, 4)


def layouts(
    arch: Architecture, precision: Precision, own: Layout, gpus: int, node: int, samples: int
) -> Iterator[Layout]:
    """For `gpus` devices, `node` of them a node: tensor parallelism stays within one. Replicas overlap their collectives with
    what else there is to do. `own`: the run's layout, of which what is not planned is kept. `samples` of a global batch: more
    replicas than that would have nothing to do."""
    for tensor in _divisors(gpus):
        if tensor > node or misfits(arch, Layout(tensor=tensor), precision):
            continue
        for pipeline in _divisors(gpus // tensor):
            if pipeline > arch.head.layers or gpus // (tensor * pipeline) > samples:
                continue
            overlaps = gpus > tensor * pipeline
            for first, last in _ends(arch.head.layers, pipeline):
                for virtual in _VIRTUAL if pipeline > 1 else (1,):
                    layout = replace(
                        own,
                        tensor=tensor,
                        pipeline=pipeline,
                        virtual_pipeline=virtual,
                        first_stage_layers=first,
                        last_stage_layers=last,
                        overlap_gradient_reduce=overlaps,
                        overlap_parameter_gather=overlaps,
                    )
                    if not misfits(arch, layout, precision):
                        yield layout


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _ends(layers: int, stages: int) -> Iterator[tuple[int | None, int | None]]:
    """(first, last) stage's layers, None for as many as all others: fewer where the encoder stands, the output layer, or both.
    Of two stages the first has any number, and the last the rest."""
    if layers % stages == 0:
        yield None, None
    if stages == 1:
        return
    most = layers - 1 if stages == 2 else layers // stages
    for end in range(1, most + 1):
        if (layers - end) % (stages - 1) == 0 and layers != end * stages:
            yield end, None
            if stages > 2:
                yield None, end
    if stages < 3:
        return
    for between in range(-(-layers // stages), -(-layers // stages) + 2):
        both = layers - between * (stages - 2)
        yield from ((first, both - first) for first in range(max(1, both - between + 1), min(between, both)))
