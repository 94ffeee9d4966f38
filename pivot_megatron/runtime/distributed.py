"""Process groups from a layout, and the few collectives the project makes itself."""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from pivot_megatron.config.schema import Layout
from pivot_megatron.errors import RunError, UserError
from pivot_megatron.runtime.device import current_platform, use_threads


def world_size_from_environment() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _rendezvous() -> dict[str, Any]:
    """How processes find each other: as a launcher's environment says, or a lone process by itself."""
    if "RANK" in os.environ:
        return {}
    store = dist.HashStore()  # type: ignore[attr-defined]  # public, but left out of torch's own list
    return {"store": store, "rank": 0, "world_size": 1}


def _alone(world: int, seconds: float, error: Exception) -> str:
    """In one line, what became of processes that did not all meet."""
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    told = (str(error).splitlines() or [type(error).__name__])[0]
    return (
        f"expected {world} processes to meet at {where} within {seconds:g} s, found some missing or nobody listening "
        f"({told}); did all nodes start?"
    )


def initialize(layout: Layout, seed: int, timeout_seconds: float = 1800.0) -> None:
    """Start torch.distributed (a single process needs no launcher) and megatron-core's groups for `layout`.

    `timeout_seconds`: after which a collective that some rank never joins fails. Raises UserError if the processes at hand do
    not divide into tensor x pipeline groups, RunError if they do not all come.
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
        timeout = datetime.timedelta(seconds=timeout_seconds)
        try:
            dist.init_process_group(platform.backend, timeout=timeout, **_rendezvous())
        except (dist.DistNetworkError, dist.DistStoreError) as error:  # nobody listens, or somebody never came
            raise RunError(_alone(world, timeout_seconds, error)) from None
    make_groups(layout, seed, timeout_seconds)


def make_groups(layout: Layout, seed: int, timeout_seconds: float = 1800.0, gloo: bool = True) -> None:
    """megatron-core's groups of the processes that torch.distributed has started, and its random state on this one. `gloo`: it
    makes such groups too, beside those of the backend in use."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.chunks,
        distributed_timeout_minutes=math.ceil(timeout_seconds / 60),
        create_gloo_process_groups=gloo,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def shutdown() -> None:
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def process_groups(layout: Layout, seed: int, timeout_seconds: float = 1800.0) -> Iterator[None]:
    initialize(layout, seed, timeout_seconds)
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


def pipeline_stage() -> int:
    return int(parallel_state.get_pipeline_model_parallel_rank())


def data_parallel() -> tuple[int, int]:
    """(rank, size) of the data-parallel group."""
    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()


def tensor_parallel_coordinates() -> tuple[int, int]:
    """(rank, size) of the tensor-parallel group."""
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()


def computes_loss() -> bool:
    """Whether this rank's loss counts: the last stage's first tensor-parallel rank, since the others hold copies or none."""
    return is_last_stage() and tensor_parallel_coordinates()[0] == 0


def sum_over_ranks(values: Mapping[str, float]) -> dict[str, float]:
    """float64 sums over all ranks, on every rank. Every rank passes the same keys, and 0 where it has nothing to count."""
    packed = torch.tensor(list(values.values()), dtype=torch.float64, device=current_platform().device)
    dist.all_reduce(packed)
    return dict(zip(values, packed.tolist(), strict=True))


def peer_was_lost(error: BaseException) -> bool:
    """Whether a collective failed because a process at its other end is gone, as gloo and NCCL word it."""
    words = ("gloo", "Connection closed by peer", "NCCL", "Connection reset")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def from_main_process(value: Any) -> Any:
    """The main process's value, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def on_main_process(do: Callable[[], object]) -> None:
    """`do` there. Collective over all ranks, which go on after it, or raise the UserError or RunError that it raised."""
    problem = None
    if is_main_process():
        try:
            do()
        except (UserError, RunError) as error:
            problem = error
    if problem := from_main_process(problem):
        raise problem


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, in rank order, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
