"""A run's checkpoints: model, optimizer, schedule, data position and random state, resumed at any layout."""

from __future__ import annotations

import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject

from pivot_megatron.config.schema import Layout
from pivot_megatron.convert.store import (
    Description,
    common_state,
    content_metadata,
    load_state,
    save_state,
    steps_in,
)
from pivot_megatron.errors import UserError
from pivot_megatron.runtime.distributed import is_main_process
from pivot_megatron.train.optimizer import Optimization


@dataclass(frozen=True)
class Progress:
    """Where a run stands: `step` optimizer steps are done. The data order follows from step, seed and `data`."""

    step: int
    seed: int
    data: str  # fingerprint of the shards


class Checkpointer:
    """Saves to and resumes from `folder/step-NNNNNN`, keeping the newest `keep`."""

    def __init__(self, folder: Path, keep: int, layout: Layout, description: Description) -> None:
        self.folder = folder
        self._keep = keep
        self._layout = {"tensor": layout.tensor, "pipeline": layout.pipeline, "world": dist.get_world_size()}
        self._description = description

    def newest(self) -> Path | None:
        """The same answer on every rank."""
        steps = steps_in(self.folder)
        answer = [steps[-1][1] if steps else None]
        dist.broadcast_object_list(answer, src=0)
        return answer[0]

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

    def load(self, checkpoint: Path, wrapped: Any, optimization: Optimization, data: str, seed: int) -> Progress:
        """Raises UserError if the checkpoint was made with other data or another seed: its order would not be this run's."""
        common = common_state(checkpoint)
        progress = Progress(**common["progress"])
        for what, found, expected in (("shards", data, progress.data), ("seed", seed, progress.seed)):
            if found != expected:
                raise UserError(
                    f"{checkpoint}: was made with other {what} ({str(expected)[:12]}) than this run's "
                    f"({str(found)[:12]}), so its place in the data means nothing; restore them or use a new `out`"
                )
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
        return progress

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
