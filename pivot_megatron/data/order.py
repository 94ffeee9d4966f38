"""One global order of samples: a function of seed, epoch and position. Ranks take their shares afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pivot_megatron.config.schema import Source

# Of the seed's streams: epochs are numbered from 0, so what makes an epoch up begins past every one of them.
_MIXTURE = 1 << 40


@dataclass(frozen=True)
class Order:
    """The endless stream of shuffled epochs. `entries`: the indices of the samples that make an epoch."""

    entries: np.ndarray
    seed: int

    def __len__(self) -> int:
        """Samples of an epoch."""
        return len(self.entries)

    def batch(self, step: int, size: int) -> list[int]:
        """Sample indices of 0-based `step`'s global batch of `size`; the last batch of an epoch runs on into the next."""
        return [self._at(step * size + i) for i in range(size)]

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, len(self))
        return int(self.entries[_permutation(len(self), self.seed, epoch)[place]])


def mixed(counts: Sequence[int], sources: Sequence[Source], seed: int) -> np.ndarray:
    """`entries` of an Order over folders of `counts` samples, one after another: each source's, by its cap and its weight."""
    parts, first = [], 0
    for number, (count, source) in enumerate(zip(counts, sources, strict=True)):
        random = _generator(seed, _MIXTURE + number)
        chosen = np.arange(count)
        if source.most is not None and source.most < count:
            chosen = np.sort(random.permutation(count)[: source.most])
        whole = int(source.weight)
        rest = round((source.weight - whole) * len(chosen))
        drawn = np.sort(random.permutation(len(chosen))[:rest])
        parts += [first + chosen] * whole + [first + chosen[drawn]]
        first += count
    return np.concatenate(parts)


@lru_cache(maxsize=2)
def _permutation(samples: int, seed: int, epoch: int) -> np.ndarray:
    return _generator(seed, epoch).permutation(samples)


def _generator(seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, stream])))
