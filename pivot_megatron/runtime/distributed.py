"""Process groups from a layout, and the few collectives the project makes itself."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from pivot_megatron.config.schema import Layout
from pivot_megatron.errors import UserError
from pivot_megatron.runtime.device import current_platform, use_threads


def world_size_from_environment() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _rendezvous() -> dict[str, Any]:
    """How processes find each other: as a launcher's environment says, or a lone process by itself."""
    if "RANK" in os.environ:
        return {}
    store = dist.HashStore()  # type: ignore[attr-defined]  # public, but left out of torch's own list
    return {"store": store, "rank": 0, "world_size": 1}


def initialize(layout: Layout, seed: int, timeout_minutes: int = 30) -> None:
    """Start torch.distributed (a single process needs no launcher) and megatron-core's groups for `layout`.

    Raises UserError if the processes at hand do not divide into tensor x pipeline groups.
    """
    world = world_size_from_environment()
    if world % layout.model_parallel_size:
        raise UserError(
            f"layout: tensor {layout.tensor} x pipeline {layout.pipeline} needs a multiple of "
            f"{layout.model_parallel_size} processes, found {world}; start with --processes {layout.model_parallel_size}"
        )
    platform = current_platform()
    use_threads(layout.cpu_threads)
    if not dist.is_initialized():
        timeout = datetime.timedelta(minutes=timeout_minutes)
        dist.init_process_group(platform.backend, timeout=timeout, **_rendezvous())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor, pipeline_model_parallel_size=layout.pipeline
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def shutdown() -> None:
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def process_groups(layout: Layout, seed: int) -> Iterator[None]:
    initialize(layout, seed)
    try:
        yield
    finally:
        shutdown()


def is_main_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def is_first_stage() -> bool:
    return bool(parallel_state.is_pipeline_first_stage())


def is_last_stage() -> bool:
    return bool(parallel_state.is_pipeline_last_stage())


def data_parallel() -> tuple[int, int]:
    """(rank, size) of the data-parallel group."""
    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()


def tensor_parallel_coordinates() -> tuple[int, int]:
    """(rank, size) of the tensor-parallel group."""
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()


def sum_over_loss_ranks(values: dict[str, float]) -> dict[str, float]:
    """Sum float64 scalars that live on the last pipeline stage over data-parallel ranks; every rank gets the result.

    Every rank passes the same keys. Ranks that computed no loss, and all but one of a tensor-parallel group (they hold
    copies), add zero.
    """
    counts = is_last_stage() and tensor_parallel_coordinates()[0] == 0
    packed = torch.tensor([float(v) if counts else 0.0 for v in values.values()], dtype=torch.float64)
    packed = packed.to(current_platform().device)
    dist.all_reduce(packed)
    return dict(zip(values, packed.tolist(), strict=True))


def from_main_process(value: Any) -> Any:
    """The main process's value, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, in rank order, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
