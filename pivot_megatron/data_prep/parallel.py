"""A function over many items in several processes, the results in the items' order."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

from pivot_megatron.errors import RunError

Item = TypeVar("Item")
Result = TypeVar("Result")

# One message between processes costs as much as a small image; so many items share one.
CHUNK = 16


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, chunk: int = CHUNK
) -> Generator[Result]:
    """`function(item)` of every item. With 0 workers in this process; otherwise `items` is read only a little ahead, `chunk`
    of them a message.

    The function and its items must pickle. Raises what `function` raises, and RunError where a worker was lost.
    """
    if workers == 0:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("forkserver")  # this process may have threads, which a plain fork breaks
    # Imported once, for all workers that are forked from there.
    context.set_forkserver_preload([getattr(function, "func", function).__module__])
    iterator = iter(items)
    waiting: deque[Future[list[Result]]] = deque()
    with ProcessPoolExecutor(workers, context, initializer=_attend) as pool:
        try:
            while some := list(islice(iterator, chunk)):
                with _undisturbed():
                    waiting.append(pool.submit(_each, function, some))
                if len(waiting) > 2 * workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BrokenProcessPool as error:
            raise RunError(
                "expected every worker process to last, found one gone: memory may be short; fewer --workers, then again"
            ) from error
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Without Ctrl-C, which would part a worker that starts here from its pool; what starts ignores it from then on."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _each(function: Callable[[Item], Result], chunk: list[Item]) -> list[Result]:
    return [function(item) for item in chunk]


def _attend() -> None:
    """In a worker: Ctrl-C is the parent's to answer, and a parent that was killed takes its workers along."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
