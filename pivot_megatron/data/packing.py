"""Tokenized samples into one pack: prefix once, branches after it, sample after sample, then padding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from pivot_megatron.data.batch import PackedBatch
from pivot_megatron.data.tokens import Tokenized


def pack(
    samples: Sequence[Tokenized],
    pixels: Sequence[Tensor],
    branches_per_sample: int,
    image_size: int,
    multiple: int,
    image_index: Sequence[int] | None = None,
) -> PackedBatch:
    """`pixels`: `[3, S, S]` images. `image_index` says which of them stands at each of the samples' image places, in order;
    left out, each has its own. The pack is padded to a multiple of `multiple`.

    An empty list of samples gives a pack of padding alone, which trains nothing and joins every collective.
    """
    shown = range(len(pixels)) if image_index is None else image_index
    if sum(len(s.images) for s in samples) != len(shown):
        raise ValueError(f"samples have {sum(len(s.images) for s in samples)} image places, got {len(shown)} images")
    tokens: list[int] = []
    positions: list[int] = []
    image_positions: list[int] = []
    keys: list[int] = []
    segments: list[tuple[int, int]] = []
    predictors: list[int] = []
    targets: list[int] = []
    branch_index: list[int] = []
    for n, sample in enumerate(samples):
        start, prefix = len(tokens), len(sample.prefix)
        for at in sample.images:
            image_positions += range(start + at, start + at + sample.image_tokens)
        tokens += sample.prefix
        positions += range(prefix)
        segments += sample.segments
        for b, branch in enumerate(sample.branches):
            at, length = len(tokens), len(branch.ids)
            for i, (token, loss) in enumerate(zip(branch.ids, branch.loss, strict=True)):
                if loss:  # the first token of a branch is predicted from the last of the prefix
                    predictors.append(at + i - 1 if i else start + prefix - 1)
                    targets.append(token)
                    branch_index.append(n * branches_per_sample + b)
            tokens += branch.ids
            positions += range(prefix, prefix + length)
            keys += range(start, start + prefix)
            keys += range(at, at + length)
    length = len(tokens)
    padding = -length % multiple if length else multiple
    if padding:
        keys += range(length, length + padding)
        segments.append((padding, padding))
    return PackedBatch(
        tokens=torch.tensor(tokens + [0] * padding),
        positions=torch.tensor(positions + [0] * padding),
        image_positions=torch.tensor(image_positions, dtype=torch.long),
        image_index=torch.tensor(list(shown), dtype=torch.long),
        pixels=torch.stack(list(pixels)) if pixels else torch.zeros(0, 3, image_size, image_size),
        key_index=None if len(keys) == length + padding else torch.tensor(keys),
        query_ends=_ends([queries for queries, _ in segments]),
        key_ends=_ends([keys for _, keys in segments]),
        segments=tuple(segments),
        predictors=torch.tensor(predictors, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        branch=torch.tensor(branch_index, dtype=torch.long),
        reference=None,
        branches_per_sample=branches_per_sample,
        length=length,
        max_position=max(positions, default=0),
        keys=tuple(s.key for s in samples),
    )


def _ends(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
