"""The one form in which samples reach the model: a pack of tokens in which branches share their prefix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from pivot_megatron.data.views import View


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch: `samples` samples laid out one after another as `prefix | branch | branch ...`, then padding.

    T tokens, K keys, G segments, N predicted answer tokens, I images, P of the tokens an image's. Integers are int64 unless
    stated.

    A segment is a run of queries that attends to a run of keys, causal from the bottom right: a prefix with its first branch
    attends to itself; any other branch to the prefix and itself; padding to itself. Queries of all segments laid end to end
    are the tokens; their keys are those at `key_index`.
    """

    tokens: Tensor  # [T]; arbitrary at image positions
    positions: Tensor  # [T] rotary positions; every branch goes on from its prefix's end
    image_positions: Tensor  # [P] where images' features go, place after place
    image_rows: Tensor  # [P] which of the images' tokens goes there, counted over all images' in order
    pixels: Tensor  # float32, of all images: squares [n, 3, S, S], or patches [n, 3 * patch * patch]; n may be 0
    views: tuple[View, ...]  # [I] how each image is seen
    key_index: Tensor | None  # [K] token index of each key; None where keys are the tokens themselves
    query_ends: Tensor  # [G + 1] int32, from 0: segment g's queries are query_ends[g] to query_ends[g + 1]
    key_ends: Tensor  # [G + 1] int32, the same of its keys
    segments: tuple[tuple[int, int], ...]  # [G] (queries, keys), known on the host
    predictors: Tensor  # [N] index of the token whose hidden state predicts the target
    targets: Tensor  # [N] token ids
    branch: Tensor  # [N] branch index over the whole pack: branches_per_sample * sample + branch
    reference: (
        Tensor | None
    )  # [N] float32 log-probs of the targets under the reference model, where they come with the data
    branches_per_sample: int
    length: int  # tokens before the padding
    max_position: int  # highest of `positions`, known on the host
    keys: tuple[str, ...]  # [S] sample keys
    digests: tuple[bytes, ...]  # [S] the same of what each one's tokens are, see Tokenized
    image_digests: tuple[bytes, ...] = ()  # [S] and of its images, see `images_digest`; empty where none are read

    @property
    def samples(self) -> int:
        return len(self.keys)

    @property
    def branches(self) -> int:
        return self.samples * self.branches_per_sample

    @property
    def padding(self) -> int:
        return self.tokens.numel() - self.length

    def _tensors(self) -> dict[str, Tensor]:
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def _with(self, tensors: Mapping[str, Any]) -> PackedBatch:
        return replace(self, **tensors)

    def to(self, device: torch.device) -> PackedBatch:
        return self._with({name: value.to(device, non_blocking=True) for name, value in self._tensors().items()})

    def pinned(self) -> PackedBatch:
        """In memory that a CUDA device copies from while the host goes on."""
        return self._with({name: value.pin_memory() for name, value in self._tensors().items() if not value.is_cuda})

    def record_stream(self, stream: Any) -> None:
        """On a CUDA device: tell the allocator that work queued on `stream` uses these tensors."""
        for value in self._tensors().values():
            value.record_stream(stream)
