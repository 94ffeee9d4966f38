"""Tokenized samples into one pack: prefix once, branches after it, sample after sample, then padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pivot_megatron.data.batch import PackedBatch
from pivot_megatron.data.tokens import Tokenized


def visible_places(prefix: int, branches: Sequence[int], length: int) -> Tensor:
    """`[length, length]` bool: causal, with each branch blind to its siblings. Places past the sample see themselves,
    so that no softmax is over nothing."""
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    start = prefix
    for branch in branches:
        mask[start + branch :, start : start + branch] = False
        start += branch
    mask[start:] = False
    return mask | torch.eye(length, dtype=torch.bool)


def pack(
    samples: Sequence[Tokenized], pixels: Sequence[Tensor], branches_per_sample: int, image_size: int, multiple: int
) -> PackedBatch:
    """`pixels`: `[3, S, S]` of each sample that has an image, in order. The pack is padded to a multiple of `multiple`.

    An empty list of samples gives a pack of padding alone, which trains nothing and joins every collective.
    """
    with_image = [s for s in samples if s.image_at is not None]
    if len(with_image) != len(pixels):
        raise ValueError(f"{len(with_image)} samples have an image, got {len(pixels)} images")
    tokens: list[int] = []
    positions: list[int] = []
    image_positions: list[int] = []
    predictors: list[int] = []
    targets: list[int] = []
    branch_index: list[int] = []
    longest = max((s.length for s in samples), default=1)
    rows = torch.zeros(max(len(samples), 1), longest, dtype=torch.long)
    visible = torch.eye(longest, dtype=torch.bool).repeat(max(len(samples), 1), 1, 1)
    places: list[int] = []
    for n, sample in enumerate(samples):
        start, prefix = len(tokens), len(sample.prefix)
        tokens += sample.prefix
        positions += range(prefix)
        if sample.image_at is not None:
            first = start + sample.image_at
            image_positions += range(first, first + sample.image_tokens)
        for b, branch in enumerate(sample.branches):
            at = len(tokens)
            for i, (token, loss) in enumerate(zip(branch.ids, branch.loss, strict=True)):
                if loss:  # the first token of a branch is predicted from the last of the prefix
                    predictors.append(at + i - 1 if i else start + prefix - 1)
                    targets.append(token)
                    branch_index.append(n * branches_per_sample + b)
            tokens += branch.ids
            positions += range(prefix, prefix + len(branch.ids))
        rows[n, : sample.length] = torch.arange(start, start + sample.length)
        visible[n] = visible_places(prefix, [len(b.ids) for b in sample.branches], longest)
        places += range(n * longest, n * longest + sample.length)
    padding = -len(tokens) % multiple if tokens else multiple
    size = image_size
    return PackedBatch(
        tokens=torch.tensor(tokens + [0] * padding),
        positions=torch.tensor(positions + [0] * padding),
        image_positions=torch.tensor(image_positions, dtype=torch.long),
        pixels=torch.stack(list(pixels)) if pixels else torch.zeros(0, 3, size, size),
        rows=rows,
        visible=visible[:, None],
        places=torch.tensor(places + [0] * padding),
        predictors=torch.tensor(predictors, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        branch=torch.tensor(branch_index, dtype=torch.long),
        branches_per_sample=branches_per_sample,
        length=len(tokens),
        max_position=max(positions, default=0),
        keys=tuple(s.key for s in samples),
    )
