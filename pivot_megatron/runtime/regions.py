"""Where a process's time goes, by name: one region at a time has it, the innermost that is open."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Regions:
    """Seconds by name from its making to `stop`, of which each belongs to one region alone, so that they add up to the whole.

    `rest` has what no other region has. `settle` is called wherever one region gives way to another: on a GPU it waits for
    the device, so that time is that of the work, not of queueing it. Work that would overlap then does not.
    """

    def __init__(
        self, rest: str, settle: Callable[[], object] = lambda: None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._settle, self._clock = settle, clock
        self._open = [rest]
        self._seconds: dict[str, float] = defaultdict(float)
        settle()
        self._since = clock()

    def enter(self, name: str) -> None:
        self._turn()
        self._open.append(name)

    def leave(self) -> None:
        """The innermost, for the one around it."""
        self._turn()
        self._open.pop()

    def become(self, name: str) -> None:
        """The innermost goes on as `name`."""
        self._turn()
        self._open[-1] = name

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def stop(self) -> dict[str, float]:
        """Seconds so far by name."""
        self._turn()
        return dict(self._seconds)

    def _turn(self) -> None:
        self._settle()
        now = self._clock()
        self._seconds[self._open[-1]] += now - self._since
        self._since = now
