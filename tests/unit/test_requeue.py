"""Being asked to stop, in processes of their own: a signal ends what does not listen."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pivot_megatron.requeue import SIGNALS, mark_path, remove_mark

LISTENER = """
import time
from pivot_megatron.requeue import StopRequests
with StopRequests() as requests:
    print("ready", flush=True)
    {body}
    time.sleep(0.2)
    print(requests.signal.name if requests.signal else None, flush=True)
"""
WAITING = "deadline = time.monotonic() + {seconds}\n    while time.monotonic() < deadline: time.sleep(0.01)"


def listening(body: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", LISTENER.format(body=body)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("asked", SIGNALS)
def test_the_first_is_kept_for_whoever_looks(asked: signal.Signals) -> None:
    process = listening(WAITING.format(seconds=0.5))
    process.send_signal(asked)
    assert process.communicate()[0] == f"{asked.name}\n" and process.returncode == 0


def test_the_same_signal_told_twice_is_one() -> None:
    process = listening(WAITING.format(seconds=0.5))
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.communicate()[0] == "SIGTERM\n" and process.returncode == 0


def test_a_second_one_ends_the_process_at_once() -> None:
    process = listening(WAITING.format(seconds=30))
    process.send_signal(signal.SIGUSR1)
    time.sleep(1.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 128 + signal.SIGTERM


def test_also_while_the_main_thread_is_in_a_call_that_no_handler_interrupts() -> None:
    deadlock = "import ctypes; c = ctypes.CDLL(None); lock = ctypes.create_string_buffer(64); "
    process = listening(deadlock + "c.pthread_mutex_lock(lock); c.pthread_mutex_lock(lock)")
    process.send_signal(signal.SIGTERM)
    time.sleep(1.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 128 + signal.SIGTERM


def test_ctrl_c_keeps_its_meaning() -> None:
    process = listening(WAITING.format(seconds=30))
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=5) == -signal.SIGINT


def test_a_signal_that_was_held_back_is_heard_later() -> None:
    """As a launcher passes one on to a process that is only starting."""
    code = "import os, signal; from pivot_megatron.requeue import hold_back; hold_back(); os.kill(os.getpid(), signal.SIGTERM)"
    found = subprocess.run([sys.executable, "-c", code + LISTENER.format(body="pass")], capture_output=True, text=True)
    assert found.stdout == "ready\nSIGTERM\n"


def test_the_mark_is_removed_where_there_is_one_and_may_be(tmp_path: Path) -> None:
    mark_path(tmp_path).write_text("{}")
    remove_mark(tmp_path)
    assert not mark_path(tmp_path).exists()
    remove_mark(tmp_path / "none")
    (tmp_path / "file").write_text("")
    remove_mark(tmp_path / "file")
