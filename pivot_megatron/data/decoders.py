"""Lists of encoded images to the pixels an encoder sees, one image to a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from pivot_megatron.data.images import Backend, ImageError
from pivot_megatron.data.views import ImageViews, pixels_of

T = TypeVar("T")
R = TypeVar("R")

Decoded = Tensor | ImageError
"""Pixels of an image, float32, as `ImageViews.assembled` gives them, or why there are none."""


class Decoder(Protocol):
    """An image's pixels depend on that image alone, whatever stands beside it. Several threads may call at once."""

    def __call__(self, encoded: Sequence[bytes]) -> list[Decoded]:
        """Of each image, in order."""
        ...


class Mapper(Protocol):
    """As `map` does, in threads or without."""

    def __call__(self, function: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]: ...


@contextmanager
def mapper(workers: int) -> Iterator[Mapper]:
    """Over `workers` threads, which end with the context; 0 is the caller's own."""
    if not workers:
        yield map
        return
    # Apart from whichever threads call, which wait for these and so must not take their places.
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decoder")
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class OneByOne:
    """Each image by itself."""

    images: ImageViews
    backend: Backend
    mapped: Mapper

    def __call__(self, encoded: Sequence[bytes]) -> list[Decoded]:
        return list(self.mapped(self._decoded, encoded))

    def _decoded(self, encoded: bytes) -> Decoded:
        try:
            return pixels_of(self.images, encoded, self.backend)
        except ImageError as error:
            return error


@contextmanager
def opened(images: ImageViews, backend: Backend, workers: int) -> Iterator[Decoder]:
    """A decoder whose threads end with the context."""
    with mapper(workers) as mapped:
        yield OneByOne(images, backend, mapped)
