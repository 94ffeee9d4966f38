"""What processes say to one another, seen from outside: every call on torch.distributed's process groups, whoever makes it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch.distributed import ProcessGroup, Work  # type: ignore[attr-defined]  # public, but left out of torch's own list

_MESSAGES = ("send", "recv", "recv_anysource")
_COLLECTIVES = (
    *("allreduce", "allreduce_coalesced", "reduce", "broadcast", "barrier", "monitored_barrier"),
    *("allgather", "allgather_coalesced", "_allgather_base", "allgather_into_tensor_coalesced", "gather", "scatter"),
    *("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced", "alltoall", "alltoall_base"),
    *("all_gather_single", "all_gather_single_coalesced", "all_to_all_single"),  # as later releases name them
    *("reduce_scatter_single", "reduce_scatter_single_coalesced"),
)

Around = Callable[[], AbstractContextManager[Any]]
"""Makes the context that a call runs in."""


@contextmanager
def replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """Meanwhile `value` stands in for an attribute that is `owner`'s own, an object's, a module's or a class's."""
    own = vars(owner)[name]  # asked for as an attribute, a method of C++ would come without what binds it
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own)


@contextmanager
def calls_within(collective: Around, message: Around) -> Iterator[None]:
    """Meanwhile every call on a group of several processes runs in a context: `collective`, or `message` where it goes from one
    process to one other; and so does the wait for what it began, where that is apart.

    The groups' own class is what is changed: megatron-core has many of torch's functions under names of its own.
    """
    begun: WeakKeyDictionary[Any, Around] = WeakKeyDictionary()
    newest = [collective]  # of a batch, which ends in a call that does not say what it is of

    def watched(call: Callable[..., Any], around: Around | None) -> Callable[..., Any]:
        @functools.wraps(call)
        def run(group: Any, *args: Any, **kwargs: Any) -> Any:
            if group.size() == 1:
                return call(group, *args, **kwargs)
            newest[0] = around or newest[0]
            with newest[0]():
                work = call(group, *args, **kwargs)
            if isinstance(work, Work):
                begun[work] = newest[0]
            return work

        return run

    wait = Work.wait

    def wait_within(work: Any, *args: Any, **kwargs: Any) -> Any:
        around = begun.get(work)
        if around is None:
            return wait(work, *args, **kwargs)
        with around():
            return wait(work, *args, **kwargs)

    kinds: dict[str, Around | None] = {**dict.fromkeys(_COLLECTIVES, collective), **dict.fromkeys(_MESSAGES, message)}
    kinds["_end_coalescing"] = None
    with ExitStack() as stack:
        for name, around in kinds.items():
            if name in vars(ProcessGroup):
                call = watched(getattr(ProcessGroup, name), around)
                stack.enter_context(replaced(ProcessGroup, name, call))
        stack.enter_context(replaced(Work, "wait", wait_within))
        yield
