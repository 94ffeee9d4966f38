"""Features of many images, by the batch, and kept in files: they are what takes time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from pivot_megatron.probe.captions import CaptionSet
from pivot_megatron.probe.encoder import FrozenEncoder
from pivot_megatron.probe.image_set import ImageSet
from pivot_megatron.probe.kept import Features, kept

Say = Callable[[str], None]
_SECONDS_BETWEEN_WORDS = 5.0
IMAGES_A_FILE = 1024  # what an interrupted pass loses at most


class Images(Protocol):
    """`names`: for errors. `read`: an image's encoded bytes."""

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def read(self) -> Callable[[int], bytes]: ...


def silent(_text: str) -> None:
    """Says nothing."""


def pooled_features(
    encoder: FrozenEncoder,
    images: ImageSet,
    indices: Sequence[int] | None = None,
    batch: int = 64,
    cache: Path | None = None,
    say: Say = silent,
) -> Features:
    """`[images, width]` float32, rows of length 1: of each of the images `indices`, or all, the mean over its patches. `cache`: a
    folder that keeps them for the next time. Raises UserError naming an image that does not decode."""
    wanted = list(range(len(images)) if indices is None else indices)
    found = [np.empty((0, encoder.width), np.float32)]
    for first in range(0, len(wanted), IMAGES_A_FILE):
        part = wanted[first : first + IMAGES_A_FILE]

        def work(part: Sequence[int] = part, done: int = first) -> Features:
            rows = [
                normalize(torch.stack([patches.mean(dim=0) for patches in encoder.patches(some)]), dim=-1).cpu()
                for some in batches(images, part, batch, done, len(wanted), say)
            ]
            return torch.cat(rows).numpy()

        found.append(kept(work, cache, f"pooled {encoder.fingerprint} {images.fingerprint} {part}"))
    return np.concatenate(found)


def layer_features(
    encoder: FrozenEncoder, images: CaptionSet, batch: int = 64, cache: Path | None = None, say: Say = silent
) -> Tensor:
    """`[layers, images, width]` float32 on the host, as `FrozenEncoder.layer_means` gives them."""

    def work() -> Features:
        wanted = range(len(images))
        found = [encoder.layer_means(some).cpu() for some in batches(images, wanted, batch, 0, len(wanted), say)]
        return torch.cat(found, dim=1).numpy()

    return torch.from_numpy(kept(work, cache, f"layers {encoder.fingerprint} {images.fingerprint}"))


def batches(
    images: Images, wanted: Sequence[int], size: int, done: int, total: int, say: Say
) -> Iterator[list[tuple[str, bytes]]]:
    """(name, encoded image) of those `wanted`, `size` at once. `done` of `total` are there before; how many are now is said
    once in a while, and at the end."""
    told = time.monotonic()
    for first in range(0, len(wanted), size):
        yield [(images.names[n], images.read(n)) for n in wanted[first : first + size]]
        last = min(first + size, len(wanted))
        if last == len(wanted) or time.monotonic() - told > _SECONDS_BETWEEN_WORDS:
            told = time.monotonic()
            say(f"{done + last} of {total} images")
