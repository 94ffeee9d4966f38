"""The watch that each process of a run keeps over the others, so that one that dies or hangs ends the job and is named."""

from __future__ import annotations

import datetime
import faulthandler
import os
import socket
import sys
import threading
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch.distributed as dist

from pivot_megatron.runtime.beats import Beat, Heard, find_fault
from pivot_megatron.runtime.distributed import from_main_process, peer_was_lost

_SECONDS_TO_DUMP = 5.0  # what a folder that hangs itself may take
_TICKS_TO_MISS = 4  # beats that a rank misses before it counts as gone, once a collective has failed


@dataclass(frozen=True)
class Patience:
    """Seconds: without a sign of life; at one thing; at reading and writing files, and whatever comes before the first step."""

    silence: float
    step: float
    files: float

    @property
    def at_step(self) -> tuple[float, str]:
        """Seconds, and the config's key of them."""
        return self.step, "faults.seconds_to_hang"

    @property
    def at_files(self) -> tuple[float, str]:
        return self.files, "faults.seconds_for_files"

    @property
    def tick(self) -> float:
        """Between two beats."""
        return min(2.0, self.silence / 20)

    @property
    def timeout(self) -> float:
        """Of collectives, for where the watch itself fails."""
        return max(self.step, self.files) + 2 * self.silence


class Watch:
    """As a context in every process, around all that the run does; entering it and leaving it without an error are collective.

    A thread tells the rendezvous store how far this process is. The first process hears all others', and they hear it, so
    that the store is asked for one thing a rank. A second thread judges what was heard. It counts time in its own ticks, so
    that a job that was suspended as a whole is not taken for a dead one. Whoever finds a fault prints one line, every
    process leaves its stacks in the folder `stacks`, and ends with code 1.
    """

    def __init__(self, patience: Patience, stacks: Path) -> None:
        self._patience, self._stacks = patience, stacks
        self._tick, self._ticks = patience.tick, 0
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._host = socket.gethostname()
        self._at = (0, 0, "preparing", patience.at_files, 0)  # place, step, phase, limit, tick at which it began
        self._lost, self._ended, self._fault = False, "", ""
        self._stopped, self._published = threading.Event(), threading.Event()

    def at(self, phase: str, step: int = 0, files: bool = False) -> None:
        """This process begins with `phase` of `step`. Every rank says the same in the same order."""
        self._at = (
            self._at[0] + 1,
            step,
            phase,
            self._patience.at_files if files else self._patience.at_step,
            self._ticks,
        )

    def __enter__(self) -> Watch:
        self._board = _board(from_main_process(uuid.uuid4().hex), self._patience.timeout)
        self._board.post(f"{self._rank}", self._beat(0).as_json())
        dist.barrier()  # every rank's first beat is there
        self._hears = range(self._size) if self._rank == 0 else range(1)
        self._heard = {rank: (Beat.from_json(told), 0) for rank, told in zip(self._hears, self._read(), strict=True)}
        self._threads = [threading.Thread(target=run, name="watch", daemon=True) for run in (self._talk, self._judge)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and peer_was_lost(error):
            self._lost = True
            self._stopped.wait(4 * _TICKS_TO_MISS * self._tick)  # in which the judge names who is gone, and ends us
        if error is not None:
            self._ended = (str(error).splitlines() or [type(error).__name__])[0]
        else:
            self.at("ending")
            dist.barrier()  # nobody falls silent while another is still at work
        self._stopped.set()
        for thread in self._threads:
            thread.join(self._tick)
        if error is None:
            dist.barrier()  # whoever holds the store leaves after everybody has stopped asking it

    def _beat(self, number: int) -> Beat:
        place, step, phase, (patience, key), since = self._at
        seconds = (self._ticks - since) * self._tick
        return Beat(number, place, step, phase, seconds, patience, key, self._host, self._lost, self._ended)

    def _talk(self) -> None:
        number = 0
        while not self._stopped.wait(self._tick):
            number += 1
            try:
                self._exchange(number)
            except Exception:  # a store that is gone answers with anything; nothing heard is what is judged
                continue
        if self._ended:
            with suppress(Exception):  # the store may have left before
                self._board.post(f"{self._rank}", self._beat(number + 1).as_json())

    def _exchange(self, number: int) -> None:
        self._board.post(f"{self._rank}", self._beat(number).as_json())
        if self._rank == 0 and self._fault:
            self._board.post("fault", self._fault)
            self._published.set()
        for rank, told in zip(self._hears, self._read(), strict=True):
            beat = Beat.from_json(told)
            if beat.number != self._heard[rank][0].number:
                self._heard[rank] = (beat, self._ticks)
        if self._rank and (fault := self._board.find("fault")):
            self._leave(fault.decode(), tell=False)

    def _read(self) -> Sequence[bytes]:
        return self._board.read([f"{rank}" for rank in self._hears])

    def _judge(self) -> None:
        while not self._stopped.wait(self._tick):
            self._ticks += 1
            heard = [Heard(rank, beat, (self._ticks - at) * self._tick) for rank, (beat, at) in self._heard.items()]
            lost = self._lost or any(one.beat.lost for one in heard)
            silence = _TICKS_TO_MISS * self._tick if lost else self._patience.silence
            if fault := find_fault(heard if self._rank == 0 else _without_progress(heard), silence):
                self._fault = fault
                if self._rank == 0 and self._published.wait(_TICKS_TO_MISS * self._tick):
                    self._stopped.wait(_TICKS_TO_MISS * self._tick)  # the others read it, perhaps from a store of ours
                self._leave(fault, tell=True)

    def _leave(self, fault: str, tell: bool) -> None:
        if tell:
            print(f"pivot: {fault}; what each process was doing is in {self._stacks}", file=sys.stderr, flush=True)
        dump = threading.Thread(target=self._dump, args=(fault,), daemon=True)
        dump.start()
        dump.join(_SECONDS_TO_DUMP)
        os._exit(1)

    def _dump(self, fault: str) -> None:
        self._stacks.mkdir(parents=True, exist_ok=True)
        with (self._stacks / f"rank-{self._rank:05d}.txt").open("w") as file:
            file.write(f"{fault}\nrank {self._rank} on {self._host}, at {self._beat(0).standing}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)


def _without_progress(heard: Sequence[Heard]) -> list[Heard]:
    """For who hears the first process alone, and cannot tell whether that one is waited for or waits itself."""
    return [replace(one, beat=replace(one.beat, patience=float("inf"))) for one in heard]


class _Board(Protocol):
    """Where beats are posted, each over the last one of its name."""

    def post(self, name: str, text: str) -> None: ...

    def read(self, names: Sequence[str]) -> Sequence[bytes]:
        """What was posted under each of `names`, all of which were."""
        ...

    def find(self, name: str) -> bytes | None: ...


class _StoreBoard:
    """On a connection of its own to the store that the processes met at."""

    def __init__(self, prefix: str, timeout: float) -> None:
        store = dist.TCPStore(  # type: ignore[attr-defined]  # public, but left out of torch's own list
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=timeout),
        )
        self._store: Any = dist.PrefixStore(f"pivot/{prefix}", store)  # type: ignore[attr-defined]

    def post(self, name: str, text: str) -> None:
        self._store.set(name, text)

    def read(self, names: Sequence[str]) -> Sequence[bytes]:
        found: list[bytes] = self._store.multi_get(list(names))
        return found

    def find(self, name: str) -> bytes | None:
        found: bytes | None = self._store.get(name) if self._store.check([name]) else None
        return found


class _OwnBoard:
    """Of a lone process."""

    def __init__(self) -> None:
        self._posted: dict[str, bytes] = {}

    def post(self, name: str, text: str) -> None:
        self._posted[name] = text.encode()

    def read(self, names: Sequence[str]) -> Sequence[bytes]:
        return [self._posted[name] for name in names]

    def find(self, name: str) -> bytes | None:
        return self._posted.get(name)


def _board(prefix: str, timeout: float) -> _Board:
    return _StoreBoard(prefix, timeout) if dist.get_world_size() > 1 else _OwnBoard()
