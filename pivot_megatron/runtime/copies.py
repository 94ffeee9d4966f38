"""Micro-batches from the host to the device, one ahead of the one that is computed on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol, TypeVar

import torch

from pivot_megatron.runtime.device import Platform


class Movable(Protocol):
    def to(self, device: torch.device) -> Any:
        """A copy there; from pinned memory it does not wait for the device."""
        ...

    def record_stream(self, stream: Any) -> None:
        """Tell the allocator that work queued on `stream` uses this memory."""
        ...


B = TypeVar("B", bound=Movable)


def on_device(batches: Iterable[B], platform: Platform) -> Iterator[B]:
    """`batches` on the platform's device, in order. On CUDA each is copied on a stream of its own while the one before it is
    computed on."""
    if not platform.is_cuda:
        yield from (batch.to(platform.device) for batch in batches)
        return
    copies = torch.cuda.Stream(platform.device)

    def begin(batch: B) -> tuple[B, torch.cuda.Event]:
        with torch.cuda.stream(copies):
            moved = batch.to(platform.device)
            return moved, copies.record_event()

    ahead: tuple[B, torch.cuda.Event] | None = None
    for batch in batches:
        current, ahead = ahead, begin(batch)
        if current is not None:
            yield _arrived(*current)
    if ahead is not None:
        yield _arrived(*ahead)


def _arrived(batch: B, event: torch.cuda.Event) -> B:
    stream = torch.cuda.current_stream()
    stream.wait_event(event)
    batch.record_stream(stream)
    return batch
