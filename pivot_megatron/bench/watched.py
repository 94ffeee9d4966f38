"""A child process timed step by step from outside, its memory watched, and how fast the machine was meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pivot_megatron.errors import RunError, UserError
from pivot_megatron.runtime.memory import peak_resident

_SECONDS_BETWEEN = 0.01
_SLICE = 4.0  # seconds that the child runs before the machine is looked at again
_LAST_WORDS = 12  # lines of a failed child's output that are shown


@dataclass(frozen=True)
class Slice:
    """`seconds` that the child ran for, and the lowest rate, FLOP/s, at which the machine multiplied matrices before, after
    and now and then in between. What shares a machine comes and goes, and no counter of the kernel's tells of it."""

    seconds: float
    rate: float


@dataclass(frozen=True)
class Watched:
    """`start` reaches up to the end of the first step; `steps` are those after it. `peak_bytes`: highest resident memory up
    to the last step."""

    start: Slice
    steps: tuple[Slice, ...]
    peak_bytes: int

    @property
    def slices(self) -> tuple[Slice, ...]:
        return self.start, *self.steps


def run_watched(
    command: Sequence[str],
    metrics: Path,
    steps: int,
    log: Path,
    environment: Mapping[str, str],
    rate: Callable[[], float],
) -> Watched:
    """Run `command` to its end: it writes a line to `metrics` at each of `steps` steps' ends. `rate`: what the machine multiplies
    matrices at just now, FLOP/s.

    The child stands still while `rate` is taken: at each step's end and every few seconds in between, but not before its
    first step, what it times by itself there. What follows its last step, such as saving a checkpoint, does not count. Raises
    RunError where the command fails, with the end of its output, which goes to `log`.
    """
    if not Path("/proc/self/status").exists():
        raise UserError("bench peers: memory is read from /proc, which this system does not have; run it on Linux")
    peak = 0
    slices: list[Slice] = []
    rates = [rate()]
    with log.open("wb") as file:
        child = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=dict(environment), start_new_session=True
        )
        try:
            ran, since = 0.0, time.monotonic()
            while child.poll() is None:
                time.sleep(_SECONDS_BETWEEN)
                if len(slices) >= steps:
                    continue
                peak = max(peak, peak_resident(child.pid))
                ended = _lines(metrics) - len(slices)
                if ended or (slices and time.monotonic() - since > _SLICE):
                    os.killpg(child.pid, signal.SIGSTOP)
                    ran += time.monotonic() - since
                    rates.append(rate())
                    if ended:  # two at once where they are shorter than the wait between two looks
                        slices += [Slice(ran / ended, min(rates))] * ended
                        ran, rates = 0.0, rates[-1:]
                    since = time.monotonic()
                    os.killpg(child.pid, signal.SIGCONT)
        finally:
            child.kill()
            child.wait()
    if child.returncode:
        words = "\n".join(log.read_text(errors="replace").splitlines()[-_LAST_WORDS:])
        raise RunError(f"{command[0]} ended with {child.returncode}; the end of {log}:\n{words}")
    if len(slices) < steps:
        raise RunError(f"{command[0]} made {len(slices)} of {steps} steps; see {log}")
    return Watched(slices[0], tuple(slices[1:]), peak)


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
