"""A run's checkpoints: model, optimizer, schedule, data position and random state, resumed at any layout."""

from __future__ import annotations

import datetime
import json
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject

from pivot_megatron.checkpoints.folder import Saved, clear_leftovers, saved_of, step_folder, steps_in
from pivot_megatron.checkpoints.policy import prune
from pivot_megatron.config.schema import RunConfig
from pivot_megatron.convert.frozen import freeze_layers
from pivot_megatron.convert.saving import Saving, begin_saving
from pivot_megatron.convert.stacks import all_alone
from pivot_megatron.convert.store import (
    Description,
    common_state,
    content_metadata,
    load_state,
    set_weights,
    sharded_weights,
)
from pivot_megatron.errors import UserError
from pivot_megatron.runtime.distributed import from_main_process, is_main_process, on_main_process
from pivot_megatron.train.culprits import require_finite
from pivot_megatron.train.keeping import Pace
from pivot_megatron.train.optimizer import Optimization
from pivot_megatron.train.run_folder import RunFolder

NOTHING = "None"  # of a key that is unset, as of one that did not exist when a checkpoint was made


@dataclass(frozen=True)
class Progress:
    """Where a run stands: `step` optimizer steps are done.

    `decided`: what the losses of a run follow from, by config key, with the fingerprint of its data; `start`: the very
    checkpoints that components began from, which a reference model is read from again; `begun`: the `start_fingerprint` of all
    that the run began from; `objective`, `guard`: their states.
    """

    step: int
    decided: Mapping[str, str]
    start: Mapping[str, str]
    begun: Mapping[str, str]
    objective: Mapping[str, float] = field(default_factory=dict)
    guard: Mapping[str, Any] = field(default_factory=dict)


def decided_by(config: RunConfig, samples: str) -> dict[str, str]:
    """What may not change in the middle of a run. Layout, micro-batches, recompute and checkpointing may."""
    batch, data, spike = config.batch, config.data, config.faults.spike_factor
    return {
        "seed": str(config.seed),
        "data.shards": f"{samples}; (weight, most) {[(source.weight, source.most) for source in data.shards]}",
        "data.template": data.template,
        "data.sequence_length": str(data.sequence_length),
        "data.too_long": data.too_long,
        "data.image_backend": data.image_backend,
        # By sorted keys: the order of a mapping in the YAML decides nothing.
        # Where the reference's log-probs come from decides nothing either.
        "objective": json.dumps({**asdict(config.objective), "reference": None}, sort_keys=True),
        "optimizer": str(config.optimizer),
        "parameters": str(config.parameters),
        "precision": str(config.precision),
        "batch": f"global_size {batch.global_size}, epochs {batch.epochs}, steps {batch.steps}",
        "model.encoder.feature_layer": str(config.model.encoder.feature_layer),
        "model.encoder.image_size": str(config.model.encoder.image_size),
        "model.encoder.max_patches": str(config.model.encoder.max_patches),
        "model.projector.keep": config.model.projector.keep if config.model.projector.keep != "both" else NOTHING,
        "model.anyres": str(config.model.anyres),
        "faults.spike_factor": f"{spike} over {config.faults.spike_window} steps" if spike else NOTHING,
    }


def newest_checkpoint(folder: Path) -> Path | None:
    """The same answer on every rank."""
    steps = steps_in(folder)
    newest: Path | None = from_main_process(steps[-1][1] if steps else None)
    return newest


def progress_of(checkpoint: Path) -> Progress:
    return Progress(**common_state(checkpoint)["progress"])


def checked_progress(checkpoint: Path, decided: Mapping[str, str], instead: str = "use a new `out`") -> Progress:
    """Raises UserError naming each key in which the config is not the one that `checkpoint` was made with. `instead`: what to do
    where it is not to be restored."""
    progress = progress_of(checkpoint)
    changed = [
        f"{key}: {checkpoint} was made with {progress.decided.get(key)}, found {value}; restore it, or {instead}"
        for key, value in decided.items()
        if progress.decided.get(key, NOTHING) != value
    ]
    if changed:
        raise UserError("\n".join(changed))
    return progress


class Checkpointer:
    """Saves to and resumes from `folder/step-NNNNNN`, as the config's `checkpoints` says. Collective over all ranks."""

    def __init__(self, config: RunConfig, folder: RunFolder, description: Description) -> None:
        layout, fp8 = config.layout, config.precision.fp8
        self.folder = folder.checkpoints
        self._policy = config.checkpoints
        self._statistics = fp8 is not None and fp8.recipe == "delayed"
        self._means_since = folder.means_since
        self._layout = {"tensor": layout.tensor, "pipeline": layout.pipeline, "world": dist.get_world_size()}
        self._description = description
        self._alone = freeze_layers(description.architecture(), config.parameters)
        self._before = 0  # the step of the checkpoint before
        self._pace = Pace(config.checkpoints.most_blocked, time.monotonic())
        self._saving: Saving | None = None
        self._due: int | None = None
        self._tidy(clear_leftovers)

    @property
    def busy(self) -> bool:
        """Whether a save is on its way, or has been put off."""
        return self._saving is not None or self._due is not None

    def holds(self, step: int) -> bool:
        """Whether the newest checkpoint is that of `step`, and whole."""
        return self._before == step and self._saving is None

    def at_step(
        self, wrapped: Sequence[Any], optimization: Optimization, progress: Progress, due: bool, must: bool
    ) -> float:
        """Save where it is `due`, or later where that would hold up training for too long; `must`: at once, and whole when this
        returns. Returns the seconds that training waited. Raises RunError where what is to be saved is not finite."""
        if not (due or must or self.busy):
            return 0.0
        began = time.monotonic()
        if due or must:
            self._due = progress.step
        if self._saving is not None and (must or self._saving.written):
            self._finish(self._saving)
        if self._due is not None and (must or self._may_begin(progress.step)):
            self._begin(wrapped, optimization, progress, background=self._policy.asynchronous and not must)
        elif self._due is not None and self._due == progress.step:
            self._pace.put_off += 1
        seconds = time.monotonic() - began
        self._pace.blocked(seconds)
        if must and self._pace.put_off:
            self._say(f"saves that came later than they were due: {self._pace.put_off} (see checkpoints.most_blocked)")
        return seconds

    def finish(self) -> None:
        """Wait for a checkpoint that is still being written."""
        if self._saving is not None:
            self._finish(self._saving)

    def _may_begin(self, step: int) -> bool:
        """The same on every rank; where it may not, that is said once for each save that is due."""
        if not self._policy.asynchronous:
            return True
        wait = "the one before is still being written" if self._saving else self._pace.too_much(time.monotonic())
        wait = from_main_process(wait)
        if wait and self._due == step:
            self._say(f"the save due after step {step} is put off: {wait}")
        return wait is None

    def _begin(self, wrapped: Sequence[Any], optimization: Optimization, progress: Progress, background: bool) -> None:
        require_finite(wrapped, optimization)
        for chunk in wrapped:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)  # the last update may still be on its way to the other ranks
        state = self._state(wrapped, optimization, is_loading=False)
        state |= {
            "progress": asdict(progress),
            "scheduler": optimization.scheduler.state_dict(),
            "random": self._random_shard(_random_state()),
        }
        due, self._due = self._due or progress.step, None
        self._pace.begun(time.monotonic())
        out = step_folder(self.folder, progress.step)
        saving = begin_saving(state, out, self._description, lambda part: self._saved(progress.step, due).write(part))
        self._before = progress.step
        if background:
            self._saving = saving
            saving.start()
        else:
            saving.write()
            self._finish(saving)

    def _finish(self, saving: Saving) -> None:
        self._saving = None
        saving.finish()
        self._tidy(lambda folder: prune(folder, self._policy))

    def _saved(self, step: int, due: int) -> Saved:
        at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return Saved(step, due, at, self._layout, self._means_since(self._before))

    def _tidy(self, change: Callable[[Path], object]) -> None:
        """`change` the folder on the main process; what went wrong ends every rank."""

        def tidy() -> None:
            try:
                change(self.folder)
            except OSError as error:
                raise UserError(f"{error.filename}: cannot remove ({error.strerror})") from None

        on_main_process(tidy)

    def _say(self, text: str) -> None:
        if is_main_process():
            print(f"{self.folder}: {text}", file=sys.stderr, flush=True)

    def load(self, checkpoint: Path, wrapped: Sequence[Any], optimization: Optimization) -> None:
        common = common_state(checkpoint)
        saved = saved_of(checkpoint)
        same_layout = saved is not None and saved.layout == self._layout
        self._before = common["progress"]["step"]
        state = self._state(wrapped, optimization, is_loading=True)
        if same_layout:
            state["random"] = self._random_shard(None)
        loaded = load_state(state, checkpoint)
        for chunk, weights in zip(wrapped, loaded["model"].values(), strict=True):
            set_weights(chunk.module, weights)
        optimization.optimizer.load_state_dict(loaded["optimizer"])
        optimization.scheduler.load_state_dict(common["scheduler"])
        if same_layout:
            _restore_random(loaded["random"])
        # At another layout the generators start anew from the seed: nothing in training draws from them.

    def _state(self, wrapped: Sequence[Any], optimization: Optimization, is_loading: bool) -> dict[str, Any]:
        metadata = content_metadata()
        model = sharded_weights((chunk.module for chunk in wrapped), self._statistics)
        optimizer = optimization.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
        return {"model": model, "optimizer": all_alone(optimizer) if self._alone else optimizer}

    def _random_shard(self, value: Any) -> ShardedObject:
        """One a pipeline and tensor coordinate; data-parallel replicas hold the same."""
        pipeline, tensor = (
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_rank(),
        )
        shape = (self._layout["pipeline"], self._layout["tensor"])
        replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        return ShardedObject("random", value, shape, (pipeline, tensor), replica_id=replica)


def _random_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def _restore_random(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
