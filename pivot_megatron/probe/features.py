"""Features of many images, by the batch, and kept in files: they are what takes time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from pivot_megatron.probe.captions import CaptionSet
from pivot_megatron.probe.encoder import FrozenEncoder
from pivot_megatron.probe.image_set import ImageSet
from pivot_megatron.probe.linear import Features

Say = Callable[[str], None]


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

    def work() -> Features:
        rows = [
            normalize(torch.stack([patches.mean(dim=0) for patches in encoder.patches(some)]), dim=-1).cpu()
            for some in _batches(images, wanted, batch, say)
        ]
        return torch.cat(rows).numpy() if rows else np.empty((0, encoder.width), np.float32)

    return kept(work, cache, f"{encoder.fingerprint} {encoder.projector is not None} {images.fingerprint} {wanted}")


def layer_features(
    encoder: FrozenEncoder, images: CaptionSet, batch: int = 64, cache: Path | None = None, say: Say = silent
) -> Tensor:
    """`[layers, images, width]` float32 on the host, as `FrozenEncoder.layer_means` gives them."""

    def work() -> Features:
        wanted = range(len(images))
        found = [encoder.layer_means(some).cpu() for some in _batches(images, wanted, batch, say)]
        return torch.cat(found, dim=1).numpy()

    return torch.from_numpy(kept(work, cache, f"layers {encoder.fingerprint} {images.fingerprint}"))


def kept(work: Callable[[], Features], cache: Path | None, told: str) -> Features:
    """What `work` returned, now or when it was asked for with an equal `told` before."""
    if cache is None:
        return work()
    file = cache / f"{hashlib.sha256(told.encode()).hexdigest()[:32]}.npy"
    if file.exists():
        found: Features = np.load(file)
        return found
    found = work()
    cache.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    with part.open("wb") as out:
        np.save(out, found)
    part.replace(file)
    return found


def _batches(
    images: ImageSet | CaptionSet, wanted: Sequence[int], size: int, say: Say
) -> Iterator[list[tuple[str, bytes]]]:
    for first in range(0, len(wanted), size):
        yield [(images.names[n], images.read(n)) for n in wanted[first : first + size]]
        say(f"{min(first + size, len(wanted))} of {len(wanted)} images")
