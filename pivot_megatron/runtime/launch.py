"""Several processes on this machine, without a launcher typed by hand."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import IO

from pivot_megatron.config.schema import Layout
from pivot_megatron.errors import RuleError, UserError
from pivot_megatron.requeue import StopRequests, hold_back
from pivot_megatron.runtime.device import device_count

_SECONDS_TO_FOLLOW = 5.0  # that the other processes get to end by themselves once one has failed


def default_processes(layout: Layout) -> int:
    """One a GPU; on a machine without, as many as the layout's tensor and pipeline sizes need."""
    return device_count() or layout.model_parallel_size


@dataclass(frozen=True)
class Nodes:
    """This machine among those of a run, as torchrun's options name them. `address`: (host, port) of the first; None for one
    that is alone, which finds a port by itself."""

    count: int = 1
    rank: int = 0
    address: tuple[str, int] | None = None

    @classmethod
    def from_environment(cls) -> Nodes:
        """NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT, as a cluster's launcher sets them. Raises UserError where one of them
        is missing."""
        names = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
        found = {name: os.environ.get(name, "") for name in names}
        if found["NNODES"] in ("", "1"):
            return cls()
        count, rank, port = (found[name] for name in ("NNODES", "NODE_RANK", "MASTER_PORT"))
        sound = count.isdecimal() and rank.isdecimal() and port.isdecimal() and found["MASTER_ADDR"]
        if not sound or int(rank) >= int(count):
            told = ", ".join(f"{name}={value!r}" for name, value in found.items())
            raise UserError(
                f"NNODES: expected a number of nodes, this one's NODE_RANK, MASTER_ADDR and MASTER_PORT, found {told}"
            )
        return cls(int(count), int(rank), (found["MASTER_ADDR"], int(port)))


def launch(
    processes: int, arguments: Sequence[str], requests: StopRequests | None = None, *, answers: bool = True
) -> int:
    """Run `pivot ARGUMENTS` in `processes` processes, told of each other and of those of other nodes as torchrun does; returns 0
    or what the first to fail ended with, and RuleError's code wherever one of them ended with that.

    The signal that `requests` gets is passed on to all of them, which then end by themselves; they enter StopRequests too.
    Without `answers` the first's stdout is dropped as the others' is.

    torchrun itself would put a page of its own around a user's one-line mistake, exit with 1 whatever the reason, and print
    a traceback on Ctrl-C. The first process has the terminal; of the others' words only those of a failure that the first
    did not see are shown. Ctrl-C, and the end of this process in whatever way, ends them all.
    """
    with ExitStack() as stack:
        nodes = Nodes.from_environment()
        errors = [None, *(stack.enter_context(tempfile.TemporaryFile()) for _ in range(processes - 1))]
        children = stack.enter_context(_children(nodes, arguments, errors, requests is not None, answers))
        if requests is not None:
            requests.before_leaving = partial(_kill, children)
        return _wait(children, errors, nodes.rank * processes, requests or StopRequests())


@contextmanager
def _children(
    nodes: Nodes, arguments: Sequence[str], errors: Sequence[IO[bytes] | None], listen: bool, answers: bool
) -> Iterator[list[subprocess.Popen[bytes]]]:
    command = [sys.executable, "-m", "pivot_megatron.cli", *arguments]
    processes = len(errors)
    host, port = nodes.address or ("127.0.0.1", _free_port())
    first = nodes.rank * processes
    shared = {**os.environ, "WORLD_SIZE": f"{nodes.count * processes}", "LOCAL_WORLD_SIZE": f"{processes}"}
    shared |= {"MASTER_ADDR": host, "MASTER_PORT": f"{port}"}
    children: list[subprocess.Popen[bytes]] = []
    try:
        for rank, error in enumerate(errors):
            children.append(
                subprocess.Popen(
                    command,
                    env={**shared, "RANK": f"{first + rank}", "LOCAL_RANK": f"{rank}"},
                    stdout=None if rank == 0 and answers else subprocess.DEVNULL,
                    stderr=error,
                    start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the others
                    preexec_fn=partial(_before_exec, listen),
                )
            )
        yield children
    finally:
        _kill(children)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _before_exec(listen: bool) -> None:
    """In the child: be killed when the parent dies, also of a signal that it cannot handle; lose no signal that is passed on
    before it listens."""
    if listen:
        hold_back()
    if sys.platform == "linux":
        parent_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
        ctypes.CDLL(None).prctl(parent_death_signal, int(signal.SIGKILL))


def _wait(
    children: Sequence[subprocess.Popen[bytes]],
    errors: Sequence[IO[bytes] | None],
    first_rank: int,
    requests: StopRequests,
) -> int:
    failed = _first_failures(children, requests)
    for n in failed:
        if (killed_by := -children[n].returncode) > 0:
            print(
                f"pivot: process {first_rank + n} on {socket.gethostname()} was killed by {signal.Signals(killed_by).name}, "
                "so the others are ended; the same command goes on from what is saved",
                file=sys.stderr,
                flush=True,
            )
    if not failed:
        return 0
    _follow(children)
    # Whoever loses the one that a rule ended may be gone before it.
    ended = next((n for n, child in enumerate(children) if child.returncode == RuleError.exit_code), failed[0])
    code = children[ended].returncode
    # Of a mistake in the input, or a rule, the first process has seen the same one and said so; whatever else it ended with may
    # only be that it lost the others.
    if not (code in (UserError.exit_code, RuleError.exit_code) and children[0].returncode == code):
        sys.stderr.write(_words_of_others(errors, first=ended))
    return code if code > 0 else 1  # a negative code is the signal that killed it


def _first_failures(children: Sequence[subprocess.Popen[bytes]], requests: StopRequests) -> list[int]:
    """Those that failed, as soon as any has; none once all are through. Passes on what is asked meanwhile."""
    passed_on = False
    while True:
        if requests.signal is not None and not passed_on:
            passed_on = True
            for child in children:
                child.send_signal(requests.signal)
        codes = [child.poll() for child in children]
        failed = [n for n, code in enumerate(codes) if code]
        if failed or all(code == 0 for code in codes):
            return failed
        time.sleep(0.05)


def _words_of_others(errors: Sequence[IO[bytes] | None], first: int) -> str:
    """What the process that failed first said, unless it is the one with the terminal."""
    file = errors[first]
    if file is None:
        return ""
    file.seek(0)
    return file.read().decode(errors="replace")


def _follow(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """A mistake that all processes see ends them all by itself, each with its own words."""
    deadline = time.monotonic() + _SECONDS_TO_FOLLOW
    while time.monotonic() < deadline and any(child.poll() is None for child in children):
        time.sleep(0.05)


def _kill(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """SIGTERM would ask them to save."""
    for child in children:
        if child.poll() is None:
            child.kill()
    for child in children:
        child.wait()
