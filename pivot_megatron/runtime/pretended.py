"""A rank of a job that is not there: its process groups, and modules that have shapes and no memory, in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from pivot_megatron.config.schema import Layout
from pivot_megatron.runtime.distributed import make_groups, shutdown

_META = torch.device("meta")


@contextmanager
def pretended_rank(layout: Layout, rank: int, processes: int) -> Iterator[None]:
    """Within, this process is `rank` of so many, alone, and every tensor that is made is a meta tensor.

    torch's fake backend answers each collective at once and moves nothing. Only for building: what is computed is of no value.
    The process has no groups of its own before, and none after.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=processes)
    try:
        make_groups(layout, seed=0, gloo=False)
        with torch.device(_META), _EveryDevice():
            yield
    finally:
        shutdown()


class _EveryDevice(TorchFunctionMode):
    """Takes each device that is named for the meta device: megatron-core names the one that it is on. What names none is the
    default device's."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if named.get("device") is not None:
            named["device"] = _META
        return func(*(_META if isinstance(arg, torch.device) else arg for arg in args), **named)
