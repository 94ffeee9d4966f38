"""What a folder of shards holds, in a few numbers, and whether that is what a run asks of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pivot_megatron.config.schema import Data, ShardCache
from pivot_megatron.data.build import require_sound
from pivot_megatron.data.sample import BadSample, Pair
from pivot_megatron.data.shards import ShardReader, open_shards
from pivot_megatron.errors import RuleError, UserError

_LOOKED_AT = 16


@dataclass(frozen=True)
class Stock:
    """`bad`: the first of the `broken` samples. `pairs`: whether there are any among some that were looked at."""

    samples: int
    broken: int
    bad: BadSample | None
    pairs: bool


Look = Callable[[str, ShardCache | None], Stock]


def stock_of(folder: str, cache: ShardCache | None) -> Stock:
    """By its index, and some samples of it. Raises UserError, and RunError where a remote one does not answer."""
    reader = open_shards(folder, cache)
    bad = reader.known_bad
    return Stock(len(reader), len(bad), bad[0] if bad else None, _has_pairs(reader))


def _has_pairs(reader: ShardReader) -> bool:
    step = max(1, len(reader) // _LOOKED_AT)
    return any(_is_pair(reader, position) for position in range(0, len(reader), step))


def _is_pair(reader: ShardReader, position: int) -> bool:
    try:
        return isinstance(reader.read(position, images=False), Pair)
    except BadSample:
        return False


def shortages(data: Data, pairs: bool, look: Look = stock_of) -> tuple[list[int], list[str]]:
    """The samples of each folder, and what is wrong with any as `dotted.path: what, what to do`; counts mean something where
    nothing is. `pairs`: the run compares two answers."""
    found: dict[int, Stock] = {}
    wrong: list[str] = []
    for n, source in enumerate(data.shards):
        key = f"data.shards.{n}"
        try:
            stock = found[n] = look(source.folder, data.cache)
        except UserError as error:
            wrong.append(f"{key}.folder: {error}")
            continue
        if not stock.samples:
            wrong.append(f"{key}.folder: expected samples in {source.folder}, found none")
        elif pairs and not stock.pairs:
            wrong.append(
                f"{key}.folder: expected pairs, whose answers the objective compares, found none in {source.folder}"
            )
        elif source.most is not None and source.most > stock.samples:
            wrong.append(
                f"{key}.most: expected at most the {stock.samples} samples of {source.folder}, found {source.most}; lower it, or "
                "leave it out for all"
            )
    return [stock.samples for stock in found.values()], wrong or _unsound(data, found)


def _unsound(data: Data, found: Mapping[int, Stock]) -> list[str]:
    stocks = found.values()
    bad = next((stock.bad for stock in stocks if stock.bad is not None), None)
    try:
        require_sound(data, sum(stock.samples for stock in stocks), sum(stock.broken for stock in stocks), bad)
    except (UserError, RuleError) as error:
        return [str(error)]
    return []
