"""Who is to blame for a step that was not applied: samples, modules, parameters, gradients. Looked for only then, and before a
save."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from pivot_megatron.convert.load import parameters_by_global_name
from pivot_megatron.data.batch import PackedBatch
from pivot_megatron.errors import RunError
from pivot_megatron.model.composition import Stage
from pivot_megatron.runtime.distributed import data_parallel, gather_objects, sum_over_ranks
from pivot_megatron.train.optimizer import Optimization
from pivot_megatron.train.overflow import Place, first_overflow
from pivot_megatron.train.step import StepResult, Worst

_LISTED = 20  # names of each kind


@dataclass(frozen=True)
class RankReport:
    """What one rank sees. Names are global; those of `parameters` and `gradients` are of what is not finite, and `module` is the
    first whose output is not."""

    rank: int
    host: str
    replica: int
    worst: Worst | None
    module: tuple[Place, str] | None
    parameters: tuple[tuple[Place, str], ...]
    gradients: tuple[tuple[Place, str], ...]


@dataclass(frozen=True)
class Blame:
    """`samples`: by rank. `modules`: of each replica the one that overflowed. `parameters`: from the first in the forward pass
    on. `gradients`: from the first that the backward pass came to."""

    samples: tuple[RankReport, ...]
    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    gradients: tuple[str, ...]

    @classmethod
    def of(cls, reports: Sequence[RankReport]) -> Blame:
        """Of ranks with a loss, those to blame are all whose loss is not finite, or else the one with the highest."""
        with_loss = [report for report in reports if report.worst is not None]
        samples = [r for r in with_loss if not math.isfinite(_loss(r))] or sorted(with_loss, key=_loss)[-1:]
        modules = [_first_module([r for r in reports if r.replica == n]) for n in sorted({r.replica for r in reports})]
        parameters = sorted({one for report in reports for one in report.parameters})
        gradients = sorted({one for report in reports for one in report.gradients}, reverse=True)
        return cls(tuple(samples), _names([one for one in modules if one]), _names(parameters), _names(gradients))

    def as_text(self) -> str:
        """What fits a line."""
        told = [
            f"{'highest loss in ' if math.isfinite(_loss(report)) else ''}samples {_few(report.worst.keys)} of {_name(report)}"
            for report in self.samples
            if report.worst
        ]
        if self.modules:
            told.append(f"numbers first not finite in the output of {_few(self.modules)}")
        if self.parameters:
            told.append(f"parameters not finite: {_few(self.parameters, 1)}")
        if self.gradients:
            told.append(f"gradients not finite: {_few(self.gradients, 1)}")
        return "; ".join(told)

    def as_record(self) -> dict[str, Any]:
        samples = [
            {"rank": r.rank, "host": r.host, "replica": r.replica, "loss": r.worst.loss, "keys": list(r.worst.keys)}
            for r in self.samples
            if r.worst
        ]
        return {
            "samples": samples,
            "modules": list(self.modules[:_LISTED]),
            "parameters": list(self.parameters[:_LISTED]),
            "gradients": list(self.gradients[:_LISTED]),
        }


def find_culprits(wrapped: Sequence[Any], result: StepResult, batches: Sequence[PackedBatch]) -> Blame:
    """`batches`: this rank's micro-batches of the step. Collective over all ranks, which all get the same."""
    stage = Stage([chunk.module for chunk in wrapped])
    report = RankReport(
        dist.get_rank(),
        socket.gethostname(),
        data_parallel()[0],
        result.worst,
        None if math.isfinite(result.loss) else first_overflow(stage, batches),
        tuple(_broken(stage, lambda parameter: parameter)),
        tuple(_broken(stage, lambda parameter: getattr(parameter, "main_grad", None))),
    )
    return Blame.of(gather_objects(report))


def require_finite(wrapped: Sequence[Any], optimization: Optimization) -> None:
    """Before a save: raises RunError, on every rank, where a weight or the optimizer's state is not finite. Collective."""
    if not sum_over_ranks({"broken": float(not all(map(_is_finite, _state_tensors(optimization))))})["broken"]:
        return
    own = tuple(_broken([chunk.module for chunk in wrapped], lambda parameter: parameter))
    named = _names(sorted({one for found in gather_objects(own) for one in found}))
    what = f"weights that are not finite: {_few(named)}" if named else "an optimizer state that is not finite"
    raise RunError(f"checkpoints: expected finite numbers, found {what}; nothing is saved, and the run stops")


def _state_tensors(optimization: Optimization) -> Iterator[Tensor]:
    """This rank's share of the weights that train, in full precision, and of their moments."""
    for optimizer in optimization.optimizer.chained_optimizers:
        if not optimizer.is_stub_optimizer:
            yield from optimizer.get_parameters()
            for state in optimizer.optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))


def _broken(stage: Iterable[Any], tensor_of: Any) -> Iterator[tuple[Place, str]]:
    """Parameters of which `tensor_of` is not finite, where this rank has it."""
    pipeline = parallel_state.get_pipeline_model_parallel_rank()
    for n, chunk in enumerate(stage):
        for place, (name, parameter) in enumerate(parameters_by_global_name([chunk])):
            value = tensor_of(parameter)
            if value is not None and not _is_finite(value):
                yield (n, pipeline, place), name


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _loss(report: RankReport) -> float:
    return report.worst.loss if report.worst else -math.inf


def _name(report: RankReport) -> str:
    return f"rank {report.rank} on {report.host}"


def _first_module(reports: Sequence[RankReport]) -> tuple[Place, str] | None:
    return min((report.module for report in reports if report.module), default=None)


def _names(found: Sequence[tuple[Place, str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for _, name in found))


def _few(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
