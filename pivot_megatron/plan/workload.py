"""What a run's micro-batches look like, by the lengths of its samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Lengths:
    """A sample's tokens: `prefix` with its images', and each branch. `scored`: tokens with loss. `images`: sequences that go
    through the encoder, of `places` tokens between them."""

    prefix: int
    branches: tuple[int, ...]
    scored: int
    images: int
    places: int

    @property
    def tokens(self) -> int:
        """With the prefix once, as a pack has them."""
        return self.prefix + sum(self.branches)

    @property
    def separate(self) -> int:
        """With every branch behind a prefix of its own."""
        return len(self.branches) * self.prefix + sum(self.branches)

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """(queries, keys) of attention: the prefix with the first branch, then every other one."""
        first, *others = self.branches
        whole = self.prefix + first
        return (whole, whole), *((branch, self.prefix + branch) for branch in others)


@dataclass(frozen=True)
class Pack:
    """One micro-batch: `samples` one after another, then padding to a multiple of `multiple` tokens."""

    samples: tuple[Lengths, ...]
    multiple: int

    @cached_property
    def tokens(self) -> int:
        length = max(1, sum(sample.tokens for sample in self.samples))
        return -(-length // self.multiple) * self.multiple

    @cached_property
    def segments(self) -> tuple[tuple[int, int], ...]:
        padding = self.tokens - sum(sample.tokens for sample in self.samples)
        rest = ((padding, padding),) if padding else ()
        return tuple(segment for sample in self.samples for segment in sample.segments) + rest

    @cached_property
    def keys(self) -> int:
        return sum(keys for _, keys in self.segments)

    @cached_property
    def scored(self) -> int:
        return sum(sample.scored for sample in self.samples)

    def images(self, blank: int) -> tuple[int, int]:
        """(sequences, tokens) of the encoder's: a blank image of `blank` tokens where no sample has any."""
        images = sum(sample.images for sample in self.samples)
        return (images, sum(sample.places for sample in self.samples)) if images else (1, blank)


def visible(segments: Sequence[tuple[int, int]]) -> float:
    """Pairs of a query and a key that it sees, causal from the bottom right."""
    return sum(queries * (keys - (queries - 1) / 2) for queries, keys in segments)
