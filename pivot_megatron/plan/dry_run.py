"""A layout tried without its machines: the model of every stage is built, in no memory, and compared with what plans count."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from dataclasses import dataclass

from pivot_megatron.config.schema import RunConfig
from pivot_megatron.convert.plan import rows_by_parameter
from pivot_megatron.convert.start import describe_start
from pivot_megatron.errors import RunError, UserError
from pivot_megatron.model.fit import require_fit
from pivot_megatron.model.freeze import require_matches
from pivot_megatron.plan.columns import aligned
from pivot_megatron.plan.rehearsal import Build, StageFound

_SHOWN = 20  # differences: one that is in every layer is seen from fewer

_CHILD = "from pivot_megatron.plan.rehearsal import answer; answer()"


@dataclass(frozen=True)
class DryRun:
    """`stages`: what was built of each."""

    build: Build
    stages: tuple[StageFound, ...]

    @property
    def differences(self) -> tuple[str, ...]:
        return tuple(difference for stage in self.stages for difference in stage.differences)

    @property
    def passed(self) -> bool:
        return not self.differences

    @property
    def how(self) -> str:
        """Of which layers the models were, in a sentence."""
        fp8 = "; FP8, which is left out, changes none of them" if self.build.precision.fp8 else ""
        return f"Built of megatron-core's own layers, which hold the parameters that Transformer Engine's do{fp8}."

    @property
    def processes(self) -> str:
        layout = self.build.layout
        replicas = self.build.gpus // layout.model_parallel_size
        return f"{self.build.gpus} processes: tensor {layout.tensor} x pipeline {layout.pipeline} x data {replicas}"

    def rows(self) -> list[list[str]]:
        """A stage each, of one of its ranks; the heads first."""
        return [list(_TITLES), *map(_cells, self.stages)]

    def table(self) -> str:
        """A line a stage; then what was built, and the first differences."""
        lines = [self.processes, *aligned(self.rows()), self.how]
        if self.passed:
            return "\n".join([*lines, AS_PLANNED])
        shown, rest = self.differences[:_SHOWN], len(self.differences) - _SHOWN
        return "\n".join([*lines, *shown, *([f"and {rest} more"] if rest > 0 else [])])


AS_PLANNED = "Names, shapes, types and what trains are as planned on every rank."
_TITLES = ("stage", "ranks", "LLM layers", "parameters", "of them train", "weights")


def _cells(stage: StageFound) -> list[str]:
    layers = ", ".join(_span(chunk.layers) for chunk in stage.chunks)
    size = f"{stage.weight_bytes / 2**30:.2f} GiB"
    return [str(stage.stage), _span(stage.ranks), layers, f"{stage.parameters:,}", f"{stage.training:,}", size]


def _span(numbers: range) -> str:
    return f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else f"{numbers[0]}"


def build_of(config: RunConfig, gpus: int | None = None) -> Build:
    """The model of a run on so many processes, on those of one replica where left out. Reads `config.json` of its components and
    none of their weights."""
    return Build(
        describe_start(config.model).architecture(),
        config.layout,
        config.layout.model_parallel_size if gpus is None else gpus,
        config.precision,
        config.recompute,
        config.parameters,
    )


def dry_run(build: Build) -> DryRun:
    """In a process of its own, which sees no GPU: megatron-core's groups are a process's, one layout at a time.

    Raises UserError where the model cannot be cut so, the processes do not divide or a rule matches nothing, and RunError where
    that process does not end well. What differs, or cannot be built, is told in the result.
    """
    require_fit(build.arch, build.layout, build.precision)
    require_matches(list(rows_by_parameter(build.arch)), build.rules)
    size = build.layout.model_parallel_size
    if build.gpus < 1 or build.gpus % size:
        raise UserError(
            f"gpus: tensor {build.layout.tensor} x pipeline {build.layout.pipeline} needs a multiple of {size}, "
            f"found {build.gpus}"
        )
    child = subprocess.run(
        [sys.executable, "-c", _CHILD],
        input=pickle.dumps(build),
        capture_output=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    if child.returncode:
        last = (child.stderr.decode(errors="replace").splitlines() or ["it said nothing"])[-1]
        raise RunError(f"dry run: its process ended with {child.returncode}: {last}")
    return DryRun(build, pickle.loads(child.stdout))
