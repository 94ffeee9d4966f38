"""Which samples of a global batch share a micro-batch: within a token budget, and as even in work as they can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush


@dataclass(frozen=True)
class Size:
    """What a sample takes of a micro-batch: packed tokens and images; `flops` is its estimated work."""

    tokens: int
    images: int
    flops: float


def plan_micro_batches(
    sizes: Sequence[Size], ranks: int, most_tokens: int, most_images: int | None, multiple: int = 1
) -> list[list[list[int]]]:
    """For each of `ranks` its micro-batches, as indices into `sizes` in rising order.

    Every rank gets the same number of micro-batches, the least multiple of `multiple` that will do (some may be empty). The
    costliest samples are placed first, each where the least work stands and it still fits, which keeps the slowest
    micro-batch within 4/3 of the best possible where the budget does not interfere (Graham 1969). Micro-batches are dealt out to
    the ranks in turn, for of samples that are alike the first ones get one more. A sample past the budget gets a micro-batch
    of its own. A function of its arguments alone.
    """
    least = max(1, -(-sum(s.tokens for s in sizes) // (ranks * most_tokens)))
    count = -(-least // multiple) * multiple
    while (bins := _placed(sizes, ranks * count, most_tokens, most_images)) is None:
        count += multiple
    return [[sorted(b) for b in bins[rank::ranks]] for rank in range(ranks)]


def _placed(sizes: Sequence[Size], bins: int, most_tokens: int, most_images: int | None) -> list[list[int]] | None:
    placed: list[list[int]] = [[] for _ in range(bins)]
    tokens, images = [0] * bins, [0] * bins
    loads = [(0.0, b) for b in range(bins)]  # a heap: the least work first, of equals the first bin
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i].flops, i)):
        size, full = sizes[i], []
        while loads:
            work, b = heappop(loads)
            if not placed[b] or (
                tokens[b] + size.tokens <= most_tokens
                and (most_images is None or images[b] + size.images <= most_images)
            ):
                break
            full.append((work, b))
        else:
            return None
        placed[b].append(i)
        tokens[b] += size.tokens
        images[b] += size.images
        for load in ((work + size.flops, b), *full):
            heappush(loads, load)
    return placed
