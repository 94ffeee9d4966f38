"""Which rank is slower than the others, by the time that each takes before it waits for them."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from pivot_megatron.config.schema import Faults
from pivot_megatron.runtime.device import current_platform
from pivot_megatron.runtime.distributed import gather_objects


@dataclass(frozen=True)
class Straggler:
    """The slowest rank over `steps` steps that end with `step`. Seconds are means a step; `data_seconds` are a part of
    `seconds`, which it waited for data. `slower`: `seconds` over the median of all ranks, `median_seconds`."""

    step: int
    steps: int
    rank: int
    host: str
    seconds: float
    data_seconds: float
    median_seconds: float
    slower: float

    def as_text(self) -> str:
        return (
            f"steps {self.step - self.steps + 1} to {self.step}: rank {self.rank} on {self.host} takes {self.slower:.2f} times "
            f"the median ({self.seconds:.3f} s against {self.median_seconds:.3f} s a step, "
            f"{self.data_seconds:.3f} s of it waiting for data)"
        )


def slowest(step: int, steps: int, hosts: Sequence[str], seconds: Sequence[tuple[float, float]]) -> Straggler:
    """`seconds`: of each rank, (computing, waiting for data) over all `steps` steps."""
    own = [(computing + waiting) / steps for computing, waiting in seconds]
    rank, middle = max(range(len(own)), key=own.__getitem__), median(own)
    waiting = seconds[rank][1] / steps
    return Straggler(step, steps, rank, hosts[rank], own[rank], waiting, middle, own[rank] / max(middle, 1e-9))


class StragglerWatch:
    """Adds up this rank's seconds, and compares them with the others' now and then. Collective over all ranks.

    The ranks of one model-parallel replica wait for each other all the time, so they are slow together.
    """

    def __init__(self, rules: Faults) -> None:
        self._rules = rules
        self._hosts = gather_objects(socket.gethostname())
        self._steps, self._computing, self._waiting = 0, 0.0, 0.0

    def after(self, step: int, computing: float, waiting: float) -> Straggler | None:
        """The slowest, where it is time to look and there are several ranks."""
        self._steps += 1
        self._computing += computing
        self._waiting += waiting
        if self._steps < self._rules.straggler_steps or len(self._hosts) == 1:
            return None
        own = torch.tensor([self._computing, self._waiting], dtype=torch.float64, device=current_platform().device)
        every = [torch.empty_like(own) for _ in self._hosts]
        dist.all_gather(every, own)
        steps, self._steps, self._computing, self._waiting = self._steps, 0, 0.0, 0.0
        return slowest(step, steps, self._hosts, [(float(c), float(w)) for c, w in (one.tolist() for one in every)])
