"""A run's checkpoints: model, optimizer, schedule, data position and random state, resumed at any layout."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject

from pivot_megatron.config.schema import Layout, RunConfig
from pivot_megatron.convert.store import (
    Description,
    common_state,
    content_metadata,
    load_state,
    save_state,
    steps_in,
)
from pivot_megatron.errors import UserError
from pivot_megatron.runtime.distributed import from_main_process, is_main_process
from pivot_megatron.train.optimizer import Optimization


@dataclass(frozen=True)
class Progress:
    """Where a run stands: `step` optimizer steps are done.

    `decided`: what the losses of a run follow from, by config key, with the fingerprint of its data; `start`: the very
    checkpoints that components began from, which a reference model is read from again; `objective`: its state.
    """

    step: int
    decided: Mapping[str, str]
    start: Mapping[str, str]
    objective: Mapping[str, float] = field(default_factory=dict)


def decided_by(config: RunConfig, data: str) -> dict[str, str]:
    """What may not change in the middle of a run. Layout, micro-batches, recompute and checkpointing may."""
    batch = config.batch
    return {
        "seed": str(config.seed),
        "data.shards": data,
        # Whether a broken sample stops the run may change where one did.
        "data": str(dataclasses.replace(config.data, shards=(), on_bad_sample="stop", max_bad_share=0.0)),
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
        "model.anyres": str(config.model.anyres),
    }


def newest_checkpoint(folder: Path) -> Path | None:
    """The same answer on every rank."""
    steps = steps_in(folder)
    newest: Path | None = from_main_process(steps[-1][1] if steps else None)
    return newest


def progress_of(checkpoint: Path) -> Progress:
    return Progress(**common_state(checkpoint)["progress"])


def checked_progress(checkpoint: Path, decided: Mapping[str, str]) -> Progress:
    """Raises UserError naming each key in which the config is not the one that `checkpoint` was made with."""
    progress = progress_of(checkpoint)
    changed = [
        f"{key}: {checkpoint} was made with {progress.decided.get(key)}, found {value}; restore it, or use a new `out`"
        for key, value in decided.items()
        if progress.decided.get(key) != value
    ]
    if changed:
        raise UserError("\n".join(changed))
    return progress


class Checkpointer:
    """Saves to and resumes from `folder/step-NNNNNN`, keeping the newest `keep`."""

    def __init__(self, folder: Path, keep: int, layout: Layout, description: Description) -> None:
        self.folder = folder
        self._keep = keep
        self._layout = {"tensor": layout.tensor, "pipeline": layout.pipeline, "world": dist.get_world_size()}
        self._description = description

    def save(self, wrapped: Any, optimization: Optimization, progress: Progress) -> Path:
        if wrapped.ddp_config.overlap_param_gather:
            wrapped.start_param_sync(force_sync=True)  # the last update may still be on its way to the other ranks
        out = self.folder / f"step-{progress.step:06d}"
        state = self._state(wrapped, optimization, is_loading=False)
        state |= {
            "progress": asdict(progress),
            "scheduler": optimization.scheduler.state_dict(),
            "layout": self._layout,
            "random": self._random_shard(_random_state()),
        }
        save_state(state, out, self._description, wrapped.config.params_dtype)
        self._prune()
        return out

    def load(self, checkpoint: Path, wrapped: Any, optimization: Optimization) -> None:
        common = common_state(checkpoint)
        same_layout = common["layout"] == self._layout
        state = self._state(wrapped, optimization, is_loading=True)
        if same_layout:
            state["random"] = self._random_shard(None)
        loaded = load_state(state, checkpoint)
        wrapped.module.load_state_dict(loaded["model"])
        optimization.optimizer.load_state_dict(loaded["optimizer"])
        optimization.scheduler.load_state_dict(common["scheduler"])
        if same_layout:
            _restore_random(loaded["random"])
        # At another layout the generators start anew from the seed: nothing in training draws from them.

    def _state(self, wrapped: Any, optimization: Optimization, is_loading: bool) -> dict[str, Any]:
        metadata = content_metadata()
        model = wrapped.module.sharded_state_dict(metadata=metadata)
        optimizer = optimization.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
        return {"model": model, "optimizer": optimizer}

    def _random_shard(self, value: Any) -> ShardedObject:
        """One a pipeline and tensor coordinate; data-parallel replicas hold the same."""
        pipeline, tensor = (
            parallel_state.get_pipeline_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_rank(),
        )
        shape = (self._layout["pipeline"], self._layout["tensor"])
        replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        return ShardedObject("random", value, shape, (pipeline, tensor), replica_id=replica)

    def _prune(self) -> None:
        if is_main_process():
            for _, old in steps_in(self.folder)[: -self._keep]:
                shutil.rmtree(old)
        dist.barrier()


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
