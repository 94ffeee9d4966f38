"""The parts of a training step's time, from timers put on a run from outside: nothing of them is in training itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from torch.utils.hooks import RemovableHandle

from pivot_megatron.model.composition import VisionLanguageModel
from pivot_megatron.plan.prediction import PARTS
from pivot_megatron.runtime.collectives import calls_within, replaced
from pivot_megatron.runtime.regions import Regions
from pivot_megatron.train.optimizer import Optimization
from pivot_megatron.train.session import Session

IDLE = "idle"
REST = "rest"
SHARES = (*PARTS, IDLE, REST)
"""What a step's time is divided into. `communication`: collectives, waiting for the others in them included; `idle`: messages
between pipeline stages, nearly all of which is waiting for them; `rest`: what is none of the others, such as adding up
gradients and writing metrics. Time at `data` is the loader's to take."""


@dataclass(frozen=True)
class _Timed(Optimization):
    """`update` is the region `optimizer`."""

    regions: Regions

    def update(self, judge: Callable[[float], str | None]) -> tuple[float, str | None]:
        with self.regions.within("optimizer"):
            return super().update(judge)


@contextmanager
def timed_parts(session: Session, regions: Regions) -> Iterator[None]:
    """Meanwhile steps of `session` tell `regions` which part they are at; what is recomputed counts to what recomputes it."""
    optimization = session.optimization
    with ExitStack() as stack:
        stack.enter_context(
            calls_within(partial(regions.within, "communication"), message=partial(regions.within, IDLE))
        )
        for name in ("forward_step", "backward_step"):
            around = _within_head(getattr(schedules, name), regions)
            stack.enter_context(replaced(schedules, name, around))
        for model in (*(chunk.module for chunk in session.wrapped), *(session.reference or ())):
            if model.pre_process:
                for handle in _encoder_hooks(model, regions):
                    stack.callback(handle.remove)
        timed = _Timed(optimization.optimizer, optimization.scheduler, regions)
        stack.enter_context(replaced(session, "optimization", timed))
        yield


def _within_head(step: Callable[..., Any], regions: Regions) -> Callable[..., Any]:
    """A forward or backward step of a micro-batch; what is the encoder's of it says so itself."""

    @functools.wraps(step)
    def run(*args: Any, **kwargs: Any) -> Any:
        with regions.within("head"):
            return step(*args, **kwargs)

    return run


def _encoder_hooks(model: VisionLanguageModel, regions: Regions) -> list[RemovableHandle]:
    """The backward pass comes to the encoder by the projector's output. It ends with the word embeddings, if they train: what
    came last forward goes first backward, and they were looked up before the encoder ran."""

    def enter(*_: object) -> None:
        regions.enter("encoder")

    def leave(*_: object) -> None:
        regions.leave()

    def backward_is(name: str) -> Callable[..., None]:
        def mark(_module: object, _inputs: object, output: torch.Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda _gradient: regions.become(name))

        return mark

    handles = []
    for module in (model.encoder, model.projector):
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    handles.append(model.projector.register_forward_hook(backward_is("encoder")))
    handles.append(model.llm.embedding.register_forward_hook(backward_is("head")))
    return handles
