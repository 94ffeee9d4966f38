"""Which samples of a global batch share a micro-batch: within a token budget, and as even in work as they can be."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush


@dataclass(frozen=True)
class Shown:
    """An image that several samples may show. A micro-batch encodes it once, in `sequences` of the encoder's: `flops`."""

    name: int
    sequences: int
    flops: float


@dataclass(frozen=True)
class Size:
    """What a sample takes of a micro-batch that it has to itself: packed tokens and images; `flops` is its estimated work.
    `shows`: those of its images that others may show too."""

    tokens: int
    images: int
    flops: float
    shows: tuple[Shown, ...] = ()


@dataclass(frozen=True)
class _Budget:
    tokens: int
    images: int | None


@dataclass
class _MicroBatch:
    budget: _Budget
    chosen: list[int] = field(default_factory=list)
    tokens: int = 0
    images: int = 0
    flops: float = 0.0
    names: set[int] = field(default_factory=set)

    def room(self, sizes: Sequence[Size]) -> int:
        """How many of `sizes`, from the first on, it takes: of nothing yet, the first in any case."""
        if len(sizes) == 1 or not self._takes(sizes[0]):
            return int(self._takes(sizes[0]))
        trial = replace(self, chosen=list(self.chosen), names=set(self.names))
        for n, size in enumerate(sizes):
            if not trial._takes(size):
                return n
            trial.add(n, size)
        return len(sizes)

    def _takes(self, size: Size) -> bool:
        if not self.chosen or self.tokens + size.tokens > self.budget.tokens:
            return not self.chosen
        return self.budget.images is None or self.after(size)[1] <= self.budget.images

    def after(self, size: Size) -> tuple[int, int, float]:
        """Tokens, images and work with one more sample, an image that stands here already counted no more."""
        names, images, flops = set[int](), size.images, size.flops
        for shown in size.shows:
            if shown.name in self.names or shown.name in names:
                images -= shown.sequences
                flops -= shown.flops
            names.add(shown.name)
        return self.tokens + size.tokens, self.images + images, self.flops + flops

    def add(self, index: int, size: Size) -> None:
        self.tokens, self.images, self.flops = self.after(size)
        self.chosen.append(index)
        self.names.update(shown.name for shown in size.shows)


def plan_micro_batches(
    sizes: Sequence[Size], ranks: int, most_tokens: int, most_images: int | None, multiple: int = 1
) -> list[list[list[int]]]:
    """For each of `ranks` its micro-batches, as indices into `sizes` in rising order.

    Every rank gets the same number of micro-batches, the least multiple of `multiple` that will do (some may be empty). The
    costliest samples are placed first, each where the least work stands and it still fits, which keeps the slowest
    micro-batch within 4/3 of the best possible where the budget does not interfere (Graham 1969). Samples over the same images
    are placed together, as far as the budget and an even share of the work allow, unless that gives the slowest rank more to
    do. Micro-batches are dealt out to the ranks in turn, for of samples that are alike the first ones get one more. A sample past
    the budget gets a micro-batch of its own. A function of its arguments alone.
    """
    budget = _Budget(most_tokens, most_images)
    least = max(1, -(-sum(s.tokens for s in sizes) // (ranks * most_tokens)))
    count = -(-least // multiple) * multiple
    alone = [[i] for i in range(len(sizes))]
    while True:
        together = _parts(sizes, ranks * count, budget)
        ways = [together, alone] if len(together) < len(alone) else [alone]
        placed = [bins for parts in ways if (bins := _placed(sizes, parts, ranks * count, budget)) is not None]
        if placed:
            bins = min(placed, key=lambda bins: max(sum(b.flops for b in bins[rank::ranks]) for rank in range(ranks)))
            return [[sorted(b.chosen) for b in bins[rank::ranks]] for rank in range(ranks)]
        count += multiple


def _parts(sizes: Sequence[Size], bins: int, budget: _Budget) -> list[list[int]]:
    """Samples over the same images, in as many parts as their share of the work has micro-batches, or they fill; all others
    alone."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, size in enumerate(sizes):
        groups[tuple(shown.name for shown in size.shows)].append(i)
    whole = _work(sizes, range(len(sizes))) or 1.0
    parts = [[i] for i in groups.pop((), ())]
    for group in groups.values():
        filled = -(-sum(sizes[i].tokens for i in group) // budget.tokens)
        count = min(len(group), max(1, filled, round(bins * _work(sizes, group) / whole)))
        parts += [group[len(group) * n // count : len(group) * (n + 1) // count] for n in range(count)]
    return parts


def _placed(
    sizes: Sequence[Size], parts: Sequence[Sequence[int]], bins: int, budget: _Budget
) -> list[_MicroBatch] | None:
    """A part that fits nowhere whole goes where the most of it fits, and its rest likewise."""
    filled = [_MicroBatch(budget) for _ in range(bins)]
    loads = [(0.0, b) for b in range(bins)]  # a heap: the least work first, of equals the first micro-batch
    for part in sorted(parts, key=lambda part: (-_work(sizes, part), part[0])):
        rest = part
        while rest:
            tried = []
            while loads:
                work, b = heappop(loads)
                room = filled[b].room([sizes[i] for i in rest])
                tried.append((-room, work, b))
                if room == len(rest):
                    break
            room, _, best = min(tried)
            if not room:
                return None
            for i in rest[:-room]:
                filled[best].add(i, sizes[i])
            rest = rest[-room:]
            for _, _, b in tried:
                heappush(loads, (filled[b].flops, b))
    return filled


def _work(sizes: Sequence[Size], part: Sequence[int]) -> float:
    whole = _MicroBatch(_Budget(0, None))
    for i in part:
        whole.add(i, sizes[i])
    return whole.flops
