"""A child process whose memory is watched while it makes its steps, and what else the machine did meanwhile."""

from __future__ import annotations

import os
import resource
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pivot_megatron.errors import RunError, UserError

_SECONDS_BETWEEN = 0.1
_LAST_WORDS = 12  # lines of a failed child's output that are shown
_BUSY = (0, 1, 2, 5, 6, 7)  # of /proc/stat's `cpu` line: user, nice, system, irq, softirq, steal


@dataclass(frozen=True)
class Watched:
    """`peak_bytes`: highest resident memory up to the last step. `others`: how many cores other processes kept busy on
    average; two threads that wait for each other at every operation lose far more than that share to them."""

    peak_bytes: int
    others: float


def run_watched(
    command: Sequence[str], metrics: Path, steps: int, log: Path, environment: Mapping[str, str]
) -> Watched:
    """Run `command` to its end. Memory counts up to the last of `steps` lines in `metrics`, so what follows, such as saving a
    checkpoint, does not. Raises RunError where the command fails, with the end of its output, which goes to `log`.
    """
    if not Path("/proc/self/status").exists():
        raise UserError("bench peers: memory is read from /proc, which this system does not have; run it on Linux")
    peak = 0
    began, busy, own = time.monotonic(), _busy_seconds(), _own_seconds()
    with log.open("wb") as file:
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=dict(environment))
        try:
            while child.poll() is None:
                seen = _peak_memory(child.pid)
                if _lines(metrics) < steps:
                    peak = max(peak, seen)
                time.sleep(_SECONDS_BETWEEN)
        finally:
            child.kill()
            child.wait()
    if child.returncode:
        words = "\n".join(log.read_text(errors="replace").splitlines()[-_LAST_WORDS:])
        raise RunError(f"{command[0]} ended with {child.returncode}; the end of {log}:\n{words}")
    others = (_busy_seconds() - busy) - (_own_seconds() - own)
    return Watched(peak, max(others, 0.0) / (time.monotonic() - began))


def _peak_memory(process: int) -> int:
    """Highest resident memory of a process so far, bytes; 0 where it has ended.

    The kernel's own mark of the process's memory. `getrusage` would not do: there a child begins with its parent's peak.
    """
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(found[0]) * 1024 if found else 0


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _busy_seconds() -> float:
    """That all cores together have worked since the machine started."""
    ticks = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    return sum(int(ticks[i]) for i in _BUSY) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """CPU time of this process and its ended children."""
    used = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)
