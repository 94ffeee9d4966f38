"""One run, from its config to its last checkpoint."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pivot_megatron.config.schema import Dpo, Model, RunConfig
from pivot_megatron.convert.load import check_layout_fits
from pivot_megatron.convert.start import checkpoints_of, describe_start, pinned, start_weights, with_checkpoints
from pivot_megatron.convert.store import Description
from pivot_megatron.data.build import build_loader
from pivot_megatron.data.loader import Dropped, Loader, StepData
from pivot_megatron.errors import RunError, UserError
from pivot_megatron.model.composition import Architecture, VisionLanguageModel, build_model
from pivot_megatron.objective.build import build_objective
from pivot_megatron.objective.types import Objective
from pivot_megatron.runtime.attention import attention_in_use
from pivot_megatron.runtime.device import current_platform
from pivot_megatron.runtime.distributed import (
    data_parallel,
    from_main_process,
    gather_objects,
    is_first_stage,
    is_main_process,
    process_groups,
    tensor_parallel_coordinates,
)
from pivot_megatron.train.agreement import agreed
from pivot_megatron.train.checkpoint import (
    Checkpointer,
    Progress,
    checked_progress,
    decided_by,
    newest_checkpoint,
    progress_of,
)
from pivot_megatron.train.optimizer import Optimization, apply_rules, build_optimization, wrap
from pivot_megatron.train.reference import ReferencePass, frozen_model
from pivot_megatron.train.run_folder import RunFolder, environment
from pivot_megatron.train.step import StepResult, observed, train_step

Report = Callable[[int, int, StepResult], None]
"""Called on the main process after each step with (steps done, steps in all, result)."""


@dataclass
class Session:
    """What a run holds between steps on this rank."""

    config: RunConfig
    folder: RunFolder
    loader: Loader
    steps: int
    objective: Objective
    wrapped: Any
    optimization: Optimization
    reference: VisionLanguageModel | None
    checkpointer: Checkpointer
    standing: Progress
    done: int
    bad: set[int]


def train(config: RunConfig, report: Report = lambda *_: None) -> int:
    """Run `config` to its end, resuming from its folder's newest checkpoint. Returns the steps this call made."""
    with process_groups(config.layout, config.seed):
        session = _prepare(config)
        made = dropped = 0
        for data, waited in _timed(session.loader.steps(session.done, session.steps)):
            started = time.perf_counter()
            data = session.loader.with_reference(agreed(session.loader, data))
            result = train_step(
                session.wrapped, session.optimization, session.objective, data.micro_batches, session.reference
            )
            session.objective = observed(session.objective, result)
            session.done += 1
            made += 1
            seconds = time.perf_counter() - started + waited
            dropped += _record(session, data, result, step_seconds=seconds, data_seconds=waited)
            _require_sound(session, result)
            _require_few_bad(session)
            if session.done % config.checkpoints.every == 0 or session.done == session.steps:
                _save(session)
            if is_main_process():
                report(session.done, session.steps, result)
        if dropped and is_main_process():
            print(f"{config.name}: {dropped} samples left out, see {session.folder.dropped}", file=sys.stderr)
        return made


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


def make_reference(config: RunConfig) -> list[Path]:
    """The reference log-probs of `config`, beside its shards: made where they are missing, checked where they are not."""
    if not isinstance(config.objective, Dpo):
        raise UserError(f"objective.kind: {config.objective.kind} compares with no reference; only dpo does")
    with process_groups(config.layout, config.seed):
        start = pinned(config.model)
        _, arch, loader = _described(config, start)
        return [file.path for file in ReferencePass(config, arch, start, loader).files(make=True)]


def _described(config: RunConfig, start: Model) -> tuple[Description, Architecture, Loader]:
    """What `start` is, checked against the layout, and the loader of its data."""
    description = replace(describe_start(start), template=config.data.template)
    arch = description.architecture()
    check_layout_fits(arch, config.layout)
    rank, size = data_parallel()
    branches = build_objective(config.objective).branches
    loader = build_loader(
        config,
        description.llm,
        description.image_views(),
        arch.encoder,
        arch.head,
        branches,
        rank,
        size,
        is_first_stage(),
    )
    return description, arch, loader


def _prepare(config: RunConfig) -> Session:
    folder = RunFolder(config)
    newest = newest_checkpoint(folder.checkpoints)
    # A resumed run's reference is the model that it began from, whatever the folder it came from has become since.
    model_start = with_checkpoints(config.model, progress_of(newest).start) if newest else pinned(config.model)
    description, arch, loader = _described(config, model_start)
    objective: Objective = build_objective(config.objective)
    steps = total_steps(config, len(loader.samples))
    decided = decided_by(config, loader.samples.fingerprint)
    standing = checked_progress(newest, decided) if newest else Progress(0, decided, checkpoints_of(model_start))
    done = standing.step
    if is_main_process():
        attention = attention_in_use(config.precision)
        folder.create(config, environment(str(current_platform().device), dist.get_world_size(), attention))
        print(f"{config.name}: attention by {attention}", file=sys.stderr, flush=True)
    dist.barrier()
    if isinstance(config.objective, Dpo) and config.objective.reference == "cached":
        loader = replace(loader, reference=ReferencePass(config, arch, model_start, loader).files(make=True))
    checkpointer = Checkpointer(folder.checkpoints, config.checkpoints.keep, config.layout, description)
    model = build_model(arch, config.layout, config.precision, config.recompute)
    if newest is None:
        start_weights(model, model_start, config.seed)
    online = isinstance(config.objective, Dpo) and config.objective.reference == "online"
    reference = frozen_model(config, arch, model_start) if online else None
    apply_rules(model, config.parameters)
    model.train()
    wrapped = wrap(model, config.layout)
    optimization = build_optimization(wrapped, config, steps)
    if newest is not None:
        checkpointer.load(newest, wrapped, optimization)
    if is_main_process():
        folder.rewind(done)
    return Session(
        config,
        folder,
        loader,
        steps,
        objective.restored(standing.objective),
        wrapped,
        optimization,
        reference,
        checkpointer,
        standing,
        done,
        from_main_process(folder.bad_samples() if is_main_process() else None),
    )


def _timed(steps: Any) -> Any:
    """Each item with the seconds waited for it."""
    iterator = iter(steps)
    while True:
        started = time.perf_counter()
        try:
            item = next(iterator)
        except StopIteration:
            return
        yield item, time.perf_counter() - started


def _record(session: Session, data: StepData, result: StepResult, step_seconds: float, data_seconds: float) -> int:
    """A line of metrics. Returns how many samples of the global batch were left out."""
    tokens = sum(batch.length for batch in data.micro_batches)
    padding = sum(batch.padding for batch in data.micro_batches)
    first_stage_share = [(data.samples, tokens, padding, (*data.dropped, *data.bad))] if _speaks_for_replica() else []
    shares = [share for found in gather_objects(first_stage_share) for share in found]
    pairs, tokens, padding = (sum(share[i] for share in shares) for i in range(3))
    dropped: list[Dropped] = [d for share in shares for d in share[3]]
    session.bad |= {d.index for d in dropped if d.bad}
    if not is_main_process():
        return len(dropped)
    session.folder.log(
        {
            "step": session.done,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "pairs": pairs,
            "tokens": tokens,
            "padding_share": padding / (tokens + padding),
            "step_seconds": step_seconds,
            "data_seconds": data_seconds,
            "dropped": len(dropped),
            "bad": sum(d.bad for d in dropped),
            "keys": data.keys_digest,
            **result.metrics,
        }
    )
    if dropped:
        session.folder.log_dropped(session.done, dropped)
    return len(dropped)


def _speaks_for_replica() -> bool:
    """One rank of each data-parallel replica: the first stage's first tensor-parallel rank."""
    return is_first_stage() and tensor_parallel_coordinates()[0] == 0


def _require_few_bad(session: Session) -> None:
    most, samples = session.config.data.max_bad_share, len(session.loader.samples)
    if len(session.bad) > most * samples:
        raise RunError(
            f"data.max_bad_share: {len(session.bad)} of {samples} samples are broken, more than the share {most:g} that may be "
            f"skipped; {session.folder.dropped} names them"
        )


def _require_sound(session: Session, result: StepResult) -> None:
    if not result.count:
        raise RunError(
            f"step {session.done}: none of its {session.config.batch.global_size} samples is sound, so it trains nothing; "
            f"{session.folder.dropped} names them"
        )
    if not (result.applied and torch.tensor([result.loss, result.grad_norm]).isfinite().all()):
        raise RunError(
            f"step {session.done}: loss {result.loss}, gradient norm {result.grad_norm}: not finite, so the run stops "
            f"before saving it; the newest whole checkpoint is in {session.folder.checkpoints}"
        )


def _save(session: Session) -> None:
    progress = replace(session.standing, step=session.done, objective=session.objective.state)
    session.checkpointer.save(session.wrapped, session.optimization, progress)
