"""The one form in which samples reach the model: a pack of tokens in which branches share their prefix."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch: `samples` samples laid out one after another as `prefix | branch | branch ...`, then padding.

    T tokens, N predicted answer tokens, S samples, L the longest sample's tokens, I images. Integers are int64.
    """

    tokens: Tensor  # [T]; arbitrary at image positions
    positions: Tensor  # [T] rotary positions; every branch goes on from its prefix's end
    image_positions: Tensor  # [I * tokens an image] where the images' features go, image after image
    pixels: Tensor  # [I, 3, H, W] float32; I may be 0
    rows: Tensor  # [S, L] token index of each place in a sample, 0 where past its end
    visible: Tensor  # [S, 1, L, L] bool: query (dim 2) may attend to key (dim 3)
    places: Tensor  # [T] index into the flattened [S * L] places; 0 for padding tokens
    predictors: Tensor  # [N] index of the token whose hidden state predicts the target
    targets: Tensor  # [N] token ids
    branch: Tensor  # [N] branch index over the whole pack: branches_per_sample * sample + branch
    branches_per_sample: int
    length: int  # tokens before the padding
    max_position: int  # highest of `positions`, known on the host
    keys: tuple[str, ...]  # [S] sample keys

    @property
    def samples(self) -> int:
        return len(self.keys)

    @property
    def branches(self) -> int:
        return self.samples * self.branches_per_sample

    def to(self, device: torch.device) -> PackedBatch:
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)
