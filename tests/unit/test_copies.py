"""Micro-batches to the device: each is on its way before the one before it is computed on, and waited for before its own turn."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch

from pivot_megatron.runtime.copies import on_device
from pivot_megatron.runtime.device import current_platform

CPU = torch.device("cpu")


@dataclass
class Batch:
    name: str
    log: list[str]

    def to(self, device: torch.device) -> Batch:
        self.log.append(f"copy {self.name}")
        return self

    def record_stream(self, stream: object) -> None:
        self.log.append(f"{stream} uses {self.name}")


class Stream:
    """Of CUDA's streams what a machine without one can show: who waits for what."""

    def __init__(self, name: object = CPU) -> None:
        self.name, self.log, self.events = name, LOG, 0

    def __str__(self) -> str:
        return f"{self.name}"

    def record_event(self) -> int:
        self.events += 1
        return self.events

    def wait_event(self, event: int) -> None:
        self.log.append(f"{self.name} waits for {event}")


LOG: list[str] = []


def computed(batches: list[Batch], log: list[str]) -> list[str]:
    for batch in on_device(batches, replace(current_platform(), device=torch.device("cuda", 0))):
        log.append(f"compute {batch.name}")
    return log


def test_each_is_copied_while_the_one_before_is_computed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    LOG.clear()
    compute = Stream("compute")
    monkeypatch.setattr("torch.cuda.Stream", Stream)
    monkeypatch.setattr("torch.cuda.current_stream", lambda: compute)
    monkeypatch.setattr("torch.cuda.stream", lambda stream: nullcontext())
    found = computed([Batch(name, LOG) for name in "abc"], LOG)
    assert found == [
        *("copy a", "copy b", "compute waits for 1", "compute uses a", "compute a"),
        *("copy c", "compute waits for 2", "compute uses b", "compute b"),
        *("compute waits for 3", "compute uses c", "compute c"),
    ]
    LOG.clear()
    assert computed([], LOG) == []


def test_on_the_host_there_is_nothing_to_wait_for() -> None:
    log: list[str] = []
    batches = [Batch(name, log) for name in "ab"]
    assert list(on_device(batches, replace(current_platform(), device=CPU))) == batches and log == ["copy a", "copy b"]
