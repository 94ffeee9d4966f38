"""Tokenized samples into one pack: prefix once, branches after it, sample after sample, then padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from pivot_megatron.data.batch import PackedBatch
from pivot_megatron.data.tokens import Tokenized


@dataclass
class _Layout:
    """Samples laid out one after another, in the names and meanings of PackedBatch's fields; `key_index` with every key."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    image_positions: list[int] = field(default_factory=list)
    key_index: list[int] = field(default_factory=list)
    segments: list[tuple[int, int]] = field(default_factory=list)
    predictors: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    branch: list[int] = field(default_factory=list)

    def add(self, sample: Tokenized, first_branch: int) -> None:
        """`first_branch`: the number of the sample's first branch in the pack."""
        start, prefix = len(self.tokens), len(sample.prefix)
        for at, view in zip(sample.images, sample.views, strict=True):
            self.image_positions += range(start + at, start + at + view.tokens)
        self.tokens += sample.prefix
        self.positions += range(prefix)
        self.segments += sample.segments
        for number, branch in enumerate(sample.branches, first_branch):
            at, length = len(self.tokens), len(branch.ids)
            for i, (token, loss) in enumerate(zip(branch.ids, branch.loss, strict=True)):
                if loss:  # the first token of a branch is predicted from the last of the prefix
                    self.predictors.append(at + i - 1 if i else start + prefix - 1)
                    self.targets.append(token)
                    self.branch.append(number)
            self.tokens += branch.ids
            self.positions += range(prefix, prefix + length)
            self.key_index += range(start, start + prefix)
            self.key_index += range(at, at + length)

    def pad(self, length: int) -> None:
        start, padding = len(self.tokens), length - len(self.tokens)
        if padding:
            self.tokens += [0] * padding
            self.positions += [0] * padding
            self.key_index += range(start, length)
            self.segments.append((padding, padding))


def pack(
    samples: Sequence[Tokenized],
    pixels: Sequence[Tensor],
    branches_per_sample: int,
    multiple: int,
    image_index: Sequence[int] | None = None,
) -> PackedBatch:
    """`pixels`: of each image, as its view has them. `image_index` says which of them stands at each of the samples' image
    places, in order; left out, each has its own. The pack is padded to a multiple of `multiple`.

    An empty list of samples gives a pack of padding alone, which trains nothing and joins every collective.
    """
    shown = range(len(pixels)) if image_index is None else image_index
    places = [view for sample in samples for view in sample.views]
    if len(places) != len(shown):
        raise ValueError(f"samples have {len(places)} image places, got {len(shown)} images")
    views = tuple(view for _, view in sorted(dict(zip(shown, places, strict=True)).items()))
    starts = list(accumulate((view.tokens for view in views), initial=0))
    layout = _Layout()
    for n, sample in enumerate(samples):
        layout.add(sample, n * branches_per_sample)
    length = len(layout.tokens)
    layout.pad(max(1, -(-length // multiple)) * multiple)
    return PackedBatch(
        tokens=_integers(layout.tokens),
        positions=_integers(layout.positions),
        image_positions=_integers(layout.image_positions),
        image_rows=_integers([row for image in shown for row in range(starts[image], starts[image + 1])]),
        pixels=torch.cat(list(pixels)) if pixels else torch.zeros(0),
        views=views,
        key_index=None if len(layout.key_index) == len(layout.tokens) else _integers(layout.key_index),
        query_ends=_ends([queries for queries, _ in layout.segments]),
        key_ends=_ends([keys for _, keys in layout.segments]),
        segments=tuple(layout.segments),
        predictors=_integers(layout.predictors),
        targets=_integers(layout.targets),
        branch=_integers(layout.branch),
        reference=None,
        branches_per_sample=branches_per_sample,
        length=length,
        max_position=max(layout.positions),
        keys=tuple(s.key for s in samples),
        digests=tuple(s.digest for s in samples),
    )


def _integers(values: Sequence[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.long)


def _ends(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
