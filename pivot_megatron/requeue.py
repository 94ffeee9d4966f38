"""Being asked to stop, and the mark that asks for a run to be started again. Standard library alone, so that it stands before
anything heavy is imported."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Those that ask a run to save and stop."""

_SECONDS_OF_ONE = 1.0  # job managers send a signal to a launcher, which passes it on, and to its processes alike


class StopRequests:
    """As a context, in the main thread: the first of SIGNALS is kept in `signal` for whoever looks, and a second one ends the
    process at once with 128 + its number, after `before_leaving`. What comes within a second of the first is the first.

    A thread hears of signals from the interpreter's C handler, so the second one counts too while the main thread waits in a
    collective. Outside of the context nothing is ever asked.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.before_leaving: Callable[[], None] = lambda: None

    def __enter__(self) -> StopRequests:
        self._heard, self._told = socket.socketpair()
        self._told.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._told.fileno(), warn_on_full_buffer=False)
        self._handlers: dict[signal.Signals, Any] = {one: signal.signal(one, lambda *_: None) for one in SIGNALS}
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # a launcher holds them back until somebody listens
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one, handler in self._handlers.items():
            signal.signal(one, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._told.close()

    def _listen(self) -> None:
        first = 0.0
        while numbers := self._heard.recv(64):
            for number in numbers:
                if number not in SIGNALS:
                    continue
                if self.signal is None:
                    first, self.signal = time.monotonic(), signal.Signals(number)
                elif time.monotonic() - first > _SECONDS_OF_ONE:
                    self.before_leaving()
                    os._exit(128 + number)
        self._heard.close()


def hold_back() -> None:
    """Keep SIGNALS waiting until this process, or the program that takes its place, enters StopRequests."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def mark_path(out: Path) -> Path:
    """In a run's folder: there, where the run was asked to stop and wants to be started again."""
    return out / "requeue.json"


def remove_mark(out: Path) -> None:
    with suppress(FileNotFoundError, NotADirectoryError):
        mark_path(out).unlink()
