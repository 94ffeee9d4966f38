"""Which rows of a table a mixture takes, and how often each."""

import math
import re
from random import Random

import numpy as np
import numpy.typing as npt

from pivot_megatron.errors import UserError

Times = npt.NDArray[np.int32]
"""`[rows]`: how often each row is taken."""

_STRATEGY = re.compile(r"(first|end|random):(\d+(?:\.\d+)?)(%?)")


def select(rows: int, strategy: str, rng: Random, where: str) -> Times:
    """`strategy`: `all`, or `first|end|random` with `:N` rows or `:x%` of them, rounded up. Raises UserError, with `where`."""
    times = np.zeros(rows, np.int32)
    if strategy == "all":
        return times + 1
    match = _STRATEGY.fullmatch(strategy)
    amount = float(match[2]) if match else 0.0
    if match is None or amount <= 0 or (amount > 100 if match[3] else not amount.is_integer()):
        raise UserError(
            f"{where}: expected all, or first, end or random with :N or :x% (as in random:10%), found {strategy!r}"
        )
    count = min(rows, math.ceil(rows * amount / 100) if match[3] else int(amount))
    if match[1] == "random":
        times[rng.sample(range(rows), count)] = 1
    elif match[1] == "first":
        times[:count] = 1
    else:
        times[rows - count :] = 1
    return times


def weigh(times: Times, weight: float, rng: Random) -> Times:
    """Every row `weight` times as often: 2 is twice, 0.5 a random half, 1.5 all once and a random half once more."""
    whole = math.floor(weight)
    slots = np.repeat(np.arange(len(times)), times)
    more = rng.sample(range(len(slots)), round((weight - whole) * len(slots)))
    return times * whole + _counted(slots[more], len(times))


def cap(times: Times, most: int, rng: Random) -> Times:
    """At most `most` rows in all, those that stay drawn at random."""
    slots = np.repeat(np.arange(len(times)), times)
    if len(slots) <= most:
        return times
    return _counted(slots[rng.sample(range(len(slots)), most)], len(times))


def _counted(slots: npt.NDArray[np.int64], rows: int) -> Times:
    return np.bincount(slots, minlength=rows).astype(np.int32)
