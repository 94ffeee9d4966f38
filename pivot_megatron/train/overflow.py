"""In which module of a model the forward pass first leaves the finite numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from torch.utils._pytree import tree_leaves

from pivot_megatron.convert.load import global_name
from pivot_megatron.data.batch import PackedBatch
from pivot_megatron.model.composition import Stage
from pivot_megatron.train.step import forward_logprobs

Place = tuple[int, int, int]
"""Where something stands in the forward pass: chunk of a virtual pipeline, stage, how many outputs came before it there."""


def first_overflow(stage: Stage, batches: Sequence[PackedBatch]) -> tuple[Place, str] | None:
    """The module of this rank that was the first to give numbers that are not finite, if any did, by its global name.

    Of the micro-batches of a step, which are passed through the model again, forward only. Collective over all ranks of a
    replica. Where it stands on the first of a pipeline's stages that has one, it was given finite numbers.
    """
    found: list[tuple[Place, str]] = []
    with ExitStack() as stack:
        for n, chunk in enumerate(stage):
            stack.enter_context(_noting(chunk, n, found))
        forward_logprobs(stage, batches)
    return min(found, default=None)


@contextmanager
def _noting(chunk: Any, n: int, found: list[tuple[Place, str]]) -> Iterator[None]:
    """Puts the first module of `chunk` that overflows into `found`. A module's hook is called after those of its own parts,
    and so the chunk's own for what none of them gave: the log-probs. Tensor-parallel ranks call their modules in the same
    order, whatever the order in which they are registered."""
    pipeline = parallel_state.get_pipeline_model_parallel_rank()
    outputs, first = itertools.count(), list[str]()

    def noting(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            place = next(outputs)
            if not first and not all(map(_is_finite, tree_leaves(output))):
                first.append(name)
                found.append(((n, pipeline, place), global_name(chunk, name) or "log-probs"))

        return hook

    hooks = [module.register_forward_hook(noting(name)) for name, module in chunk.named_modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_finite(value: object) -> bool:
    return not (isinstance(value, torch.Tensor) and value.is_floating_point()) or bool(torch.isfinite(value).all())
