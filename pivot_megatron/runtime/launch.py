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
from typing import IO

from pivot_megatron.config.schema import Layout
from pivot_megatron.runtime.device import device_count

_SECONDS_TO_FOLLOW = 5.0  # that the other processes get to end by themselves once one has failed
_SECONDS_TO_STOP = 10.0


def default_processes(layout: Layout) -> int:
    """One a GPU; on a machine without, as many as the layout's tensor and pipeline sizes need."""
    return device_count() or layout.model_parallel_size


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run `pivot ARGUMENTS` in `processes` processes, told of each other as torchrun does; returns 0 or what the first to
    fail ended with.

    torchrun itself would put a page of its own around a user's one-line mistake, exit with 1 whatever the reason, and print
    a traceback on Ctrl-C. The first process has the terminal; of the others' words only those of a failure that the first
    did not see are shown. Ctrl-C, and the end of this process in whatever way, ends them all.
    """
    with ExitStack() as stack:
        errors = [None, *(stack.enter_context(tempfile.TemporaryFile()) for _ in range(processes - 1))]
        children = stack.enter_context(_children(processes, arguments, errors))
        return _wait(children, errors)


@contextmanager
def _children(
    processes: int, arguments: Sequence[str], errors: Sequence[IO[bytes] | None]
) -> Iterator[list[subprocess.Popen[bytes]]]:
    command = [sys.executable, "-m", "pivot_megatron.cli", *arguments]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": f"{processes}", "LOCAL_WORLD_SIZE": f"{processes}"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    children: list[subprocess.Popen[bytes]] = []
    try:
        for rank, error in enumerate(errors):
            children.append(
                subprocess.Popen(
                    command,
                    env={**shared, "RANK": f"{rank}", "LOCAL_RANK": f"{rank}"},
                    stdout=None if rank == 0 else subprocess.DEVNULL,
                    stderr=error,
                    start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the others
                    preexec_fn=_end_with_parent if sys.platform == "linux" else None,
                )
            )
        yield children
    finally:
        _stop(children)


def _end_with_parent() -> None:
    """In the child: be killed when the parent dies, also of a signal that it cannot handle."""
    parent_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
    ctypes.CDLL(None).prctl(parent_death_signal, int(signal.SIGKILL))


def _wait(children: Sequence[subprocess.Popen[bytes]], errors: Sequence[IO[bytes] | None]) -> int:
    while True:
        codes = [child.poll() for child in children]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            break
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)
    _follow(children)
    code = children[failed[0]].returncode
    # Exit code 2 is a mistake in the input. The first process has seen the same one and said so; whatever else it ended
    # with may only be that it lost the others.
    if not (code == 2 and children[0].returncode == 2):
        sys.stderr.write(_words_of_others(errors, first=failed[0]))
    return code if code > 0 else 1  # a negative code is the signal that killed it


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


def _stop(children: Sequence[subprocess.Popen[bytes]]) -> None:
    for child in children:
        if child.poll() is None:
            child.terminate()
    deadline = time.monotonic() + _SECONDS_TO_STOP
    for child in children:
        try:
            child.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
