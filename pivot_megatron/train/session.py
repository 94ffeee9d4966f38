"""What a run is made of before its first step: model, data, optimizer, and where it stands."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pivot_megatron.config.schema import Dpo, Model, RunConfig
from pivot_megatron.convert.plan import rows_by_parameter
from pivot_megatron.convert.start import checkpoints_of, describe_start, pinned, start_weights, with_checkpoints
from pivot_megatron.convert.store import Description
from pivot_megatron.data.build import build_loader
from pivot_megatron.data.loader import Loader
from pivot_megatron.errors import UserError
from pivot_megatron.model.composition import Architecture, Stage, build_model
from pivot_megatron.model.fit import require_fit
from pivot_megatron.model.flops import SampleWork, Trained, TrainingFlops
from pivot_megatron.model.specs import require_attention
from pivot_megatron.objective.build import build_objective
from pivot_megatron.objective.types import Objective
from pivot_megatron.runtime.device import current_platform
from pivot_megatron.runtime.distributed import (
    data_parallel,
    from_main_process,
    is_first_stage,
    is_main_process,
    on_main_process,
)
from pivot_megatron.runtime.kernels import kernels_in_use
from pivot_megatron.runtime.stopwatch import Stopwatch
from pivot_megatron.runtime.watch import Watch
from pivot_megatron.train.begun import fingerprint_on_all, require_begun
from pivot_megatron.train.checkpoint import (
    Checkpointer,
    Progress,
    checked_progress,
    decided_by,
    newest_checkpoint,
    progress_of,
)
from pivot_megatron.train.guard import Guard
from pivot_megatron.train.keeping import require_metric
from pivot_megatron.train.optimizer import Optimization, apply_rules, before_reduction, build_optimization, wrap
from pivot_megatron.train.reference import ReferencePass, frozen_model
from pivot_megatron.train.run_folder import RunFolder, environment
from pivot_megatron.train.stragglers import StragglerWatch
from pivot_megatron.train.tracking import Trackers, require_trackers


@dataclass
class Session:
    """What a run holds between steps on this rank. `first`: the steps that were done when it began; `done`: those by now."""

    config: RunConfig
    folder: RunFolder
    loader: Loader
    steps: int
    objective: Objective
    wrapped: list[Any]
    optimization: Optimization
    reference: Stage | None
    flops: TrainingFlops
    checkpointer: Checkpointer
    standing: Progress
    first: int
    done: int
    bad: set[int]
    guard: Guard
    watch: Watch
    stopwatch: Stopwatch
    stragglers: StragglerWatch
    trackers: Trackers

    def begins(self, phase: str) -> None:
        """With the step that is made next."""
        self.watch.at(phase, self.done + 1, files=self.done == self.first)


def total_steps(config: RunConfig, samples: int) -> int:
    if config.batch.steps is not None:
        return config.batch.steps
    steps = int(samples * (config.batch.epochs or 0) // config.batch.global_size)
    if steps < 1:
        raise UserError(
            f"batch.epochs: {config.batch.epochs} epochs of {samples} samples do not fill one batch of "
            f"{config.batch.global_size}; lower global_size or raise epochs"
        )
    return steps


def described(config: RunConfig, start: Model) -> tuple[Description, Architecture, Loader]:
    """What `start` is, checked against the layout and this machine, and the loader of its data."""
    description = replace(describe_start(start), template=config.data.template)
    arch = description.architecture()
    require_fit(arch, config.layout, config.precision)
    require_attention(arch.encoder, arch.head, config.layout, config.precision)
    rank, size = data_parallel()
    branches = build_objective(config.objective).branches
    loader = build_loader(
        config,
        description.llm,
        description.image_views(),
        SampleWork(arch, Trained.by(rows_by_parameter(arch), config.parameters)),
        branches,
        rank,
        size,
        is_first_stage(),
    )
    return description, arch, loader


def prepare(config: RunConfig, watch: Watch, trackers: Trackers, before_batch: Callable[[], None]) -> Session:
    """`trackers`: opened last, on the main process, where there are steps to make. `before_batch`: called before each batch of a
    reference pass, which it may end by raising."""
    require_metric(config)
    on_main_process(lambda: require_trackers(config.tracking))
    folder = RunFolder(config)
    newest = newest_checkpoint(folder.checkpoints)
    # A resumed run's reference is the model that it began from, whatever the folder it came from has become since.
    model_start = with_checkpoints(config.model, progress_of(newest).start) if newest else pinned(config.model)
    description, arch, loader = described(config, model_start)
    objective: Objective = build_objective(config.objective)
    steps = total_steps(config, len(loader.order))
    decided = decided_by(config, loader.samples.described)
    begun = fingerprint_on_all(model_start, config.seed)
    standing = _standing(newest, decided, model_start, begun)
    done = standing.step
    _record(config, folder)
    if isinstance(config.objective, Dpo) and config.objective.reference == "cached":
        reference_pass = ReferencePass(config, arch, model_start, begun, loader, before_batch)
        loader = replace(loader, reference=reference_pass.files(make=True))
    watch.at("preparing", files=True)
    checkpointer = Checkpointer(config, folder, description)
    model, wrapped, optimization = _trainable(config, arch, steps)
    online = isinstance(config.objective, Dpo) and config.objective.reference == "online"
    reference = frozen_model(config, arch, model_start) if online else None
    if newest is None:
        start_weights(model, model_start, config.seed)  # the optimizer is there, whose masters take what weights round
    else:
        checkpointer.load(newest, wrapped, optimization)
    if is_main_process():
        folder.rewind(done)
    if done < steps:
        watch.at("opening trackers", files=True)
        on_main_process(lambda: trackers.open(config))
    session = Session(
        config,
        folder,
        loader,
        steps,
        objective.restored(standing.objective),
        wrapped,
        optimization,
        reference,
        TrainingFlops(arch, Trained.by(rows_by_parameter(arch), config.parameters)),
        checkpointer,
        standing,
        done,
        done,
        from_main_process(folder.bad_samples() if is_main_process() else None),
        Guard(config.faults, config.optimizer.clip_gradient).restored(standing.guard),
        watch,
        Stopwatch(current_platform()),
        StragglerWatch(config.faults),
        trackers,
    )
    before_reduction(wrapped, lambda: _computed(session))
    return session


def _trainable(config: RunConfig, arch: Architecture, steps: int) -> tuple[Stage, list[Any], Optimization]:
    """This rank's stage, with no weights yet, its chunks as they train, and what trains them."""
    model = build_model(arch, config.layout, config.precision, config.recompute)
    apply_rules(model, config.parameters)
    model.train()
    wrapped = wrap(model, config.layout)
    return model, wrapped, build_optimization(wrapped, config, steps)


def _standing(newest: Path | None, decided: Mapping[str, str], start: Model, begun: Mapping[str, str]) -> Progress:
    """Of a run that begins, or of the checkpoint `newest`, which was made as config and start are now."""
    if newest is None:
        return Progress(0, decided, checkpoints_of(start), begun)
    progress = checked_progress(newest, decided)
    require_begun(progress.begun, start, begun)
    return progress


def _record(config: RunConfig, folder: RunFolder) -> None:
    """What the run is and what it runs on: in its folder, and its kernels in a line."""
    kernels = kernels_in_use(config.precision)
    device, world = str(current_platform().device), dist.get_world_size()
    on_main_process(lambda: folder.create(config, environment(device, world, kernels)))
    if is_main_process():
        told = f"layers {kernels.layers}, attention by {kernels.attention}, fp8 {kernels.fp8}"
        for line in (*(f"not used: {one}" for one in kernels.passed_over), told):
            print(f"{config.name}: {line}", file=sys.stderr, flush=True)


def _computed(session: Session) -> None:
    """The backward pass is through; what follows waits for other ranks."""
    session.stopwatch.stop()
    session.begins("gradients and update")
