"""One global order of samples: a function of seed, epoch and position. Ranks take their shares afterwards."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=2)
def _permutation(samples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch]))).permutation(samples)


def index_at(position: int, samples: int, seed: int) -> int:
    """Which sample stands at `position` of the endless stream of shuffled epochs."""
    epoch, place = divmod(position, samples)
    return int(_permutation(samples, seed, epoch)[place])


def step_indices(step: int, global_size: int, samples: int, seed: int) -> list[int]:
    """Sample indices of 0-based `step`'s global batch; the last batch of an epoch runs on into the next."""
    return [index_at(step * global_size + i, samples, seed) for i in range(global_size)]
