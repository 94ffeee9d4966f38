"""Progress of long work: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

_BAR_WIDTH = 30
_SECONDS_BETWEEN = {True: 0.2, False: 30.0}


def track(items: Iterable[Item], total: int, label: str) -> Iterator[Item]:
    """Yield the items, and say on stderr how many of `total` are done."""
    terminal = sys.stderr.isatty()
    said = time.monotonic()
    done = 0
    for item in items:
        yield item
        done += 1
        now = time.monotonic()
        if now - said >= _SECONDS_BETWEEN[terminal]:
            said = now
            _say(label, done, total, terminal)
    _say(label, done, total, terminal)
    if terminal:
        sys.stderr.write("\n")


def _say(label: str, done: int, total: int, terminal: bool) -> None:
    if terminal:
        filled = _BAR_WIDTH * done // max(total, 1)
        sys.stderr.write(f"\r{label} [{'#' * filled:{_BAR_WIDTH}}] {done}/{total}")
    else:
        sys.stderr.write(f"{label}: {done} of {total}\n")
    sys.stderr.flush()
