"""A bounded folder of byte ranges on disk, shared by threads, processes and runs at once.

`entries/` holds a file a range: a checksum and the bytes, named by a digest of the key, its modification time that of its last
use. `total` holds the bytes that all take, and its lock is held while one is added, so the bound holds whoever writes.
`locks/` makes one of several that miss the same range fetch it, and the others wait.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pivot_megatron.errors import UserError

_DIGEST = 16
_DISK_BLOCK = 4096  # what a file takes is a multiple of this, and small ones take one
_KEPT = 0.9  # of the bound, after making room: a scan of the folder then serves a tenth of it
_STRIPES = 1 << 12
_PATIENCE = 60.0  # seconds for another's fetch or scan; then it is taken for stuck, and done without
_PARTIAL = ".partial"
_DIGITS = 20


class RangeCache:
    """At most `most` bytes in `folder`, the longest unused going first. A copy in another process is the same cache.

    A run does not end for its cache: where the disk refuses, that is said once on stderr and ranges are fetched every time.
    Raises UserError where `folder` cannot be written to when it is opened.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self._folder = folder.absolute()
        self._most = most
        self._complained = False
        try:
            for name in ("entries", "locks"):
                (self._folder / name).mkdir(parents=True, exist_ok=True)
            self._total.touch()
        except OSError as error:
            raise UserError(
                f"data.cache.folder: expected a folder to write to, found {folder}: {error.strerror}"
            ) from None

    @property
    def _total(self) -> Path:
        return self._folder / "total"

    def get(self, key: str, fetch: Callable[[], bytes]) -> bytes:
        """The bytes that `key` names, from disk or by `fetch`. Raises what `fetch` does."""
        if (data := self._read(key)) is not None:
            return data
        with self._alone(self._folder / "locks" / f"{int(_name(key)[:8], 16) % _STRIPES:03x}"):
            if (data := self._read(key)) is None:
                data = fetch()
                self._keep(key, data)
        return data

    def holds(self, key: str) -> bool:
        """Whether there is an entry, sound or not."""
        return self._path(key).exists()

    def _path(self, key: str) -> Path:
        name = _name(key)
        return self._folder / "entries" / name[:2] / name

    def _read(self, key: str) -> bytes | None:
        """None where there is none, or one that another has just removed, or that is damaged."""
        path = self._path(key)
        try:
            with path.open("rb") as file:
                digest, data = file.read(_DIGEST), file.read()
        except OSError:
            return None
        if _checksum(key, data) != digest:
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            _mark_used(path)
        return data

    def _keep(self, key: str, data: bytes) -> None:
        path, size = self._path(key), _on_disk(_DIGEST + len(data))
        if size > self._most:
            return
        temporary = path.with_name(path.name + _PARTIAL)
        with self._alone(self._total) as total:
            if total is None:
                return
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                used = self._room_for(size, _number(total))
                _set_number(total, used + size)
                temporary.write_bytes(_checksum(key, data) + data)
                _mark_used(temporary)
                temporary.replace(path)
            except OSError as error:
                self._complain(error)
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)
                with suppress(OSError):
                    _set_number(total, None)  # counted anew by the next who writes

    def _room_for(self, size: int, used: int | None) -> int:
        """Make room where there is not enough; the bytes that are in use then."""
        if used is not None and used + size <= self._most:
            return used
        return self._shrink(self._most - size, int(self._most * _KEPT) - size)

    def _shrink(self, most: int, goal: int) -> int:
        """Count what is there, and if that is more than `most` bytes, remove the longest unused down to `goal`."""
        found: list[tuple[int, int, str]] = []
        for folder in os.scandir(self._folder / "entries"):
            for entry in os.scandir(folder.path):
                with suppress(OSError):
                    if entry.name.endswith(_PARTIAL):  # a writer was killed: the lock is ours, so none is at work
                        Path(entry.path).unlink()
                        continue
                    about = entry.stat()
                    found.append((about.st_mtime_ns, _on_disk(about.st_size), entry.path))
        total = sum(size for _, size, _ in found)
        if total <= most:
            return total
        for _, size, path in sorted(found):
            if total <= max(goal, 0):
                break
            with suppress(FileNotFoundError):
                Path(path).unlink()
            total -= size
        return total

    @contextmanager
    def _alone(self, path: Path) -> Iterator[BinaryIO | None]:
        """The file at `path`, locked; or None where it cannot be, or others hold it too long."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        except OSError as error:
            self._complain(error)
            yield None
            return
        with file:
            yield file if self._lock(file) else None

    def _lock(self, file: BinaryIO) -> bool:
        # A lock is of an open file, so it also keeps threads apart, and ends with its holder, killed or not.
        until, pause = time.monotonic() + _PATIENCE, 0.001
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > until:
                    return False
            except OSError as error:  # a file system without locks
                self._complain(error)
                return False
            time.sleep(pause)
            pause = min(pause * 1.5, 0.02)

    def _complain(self, error: OSError) -> None:
        if not self._complained:
            self._complained = True
            print(
                f"data.cache.folder: {self._folder}: {error.strerror or error}; going on, remote samples are not kept",
                file=sys.stderr,
                flush=True,
            )


def _name(key: str) -> str:
    return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()


def _checksum(key: str, data: bytes) -> bytes:
    # Over the key too: a file under another's name is found out.
    digest = hashlib.blake2b(key.encode(), digest_size=_DIGEST)
    digest.update(b"\0")
    digest.update(data)
    return digest.digest()


def _on_disk(size: int) -> int:
    return -(-size // _DISK_BLOCK) * _DISK_BLOCK


def _mark_used(path: Path) -> None:
    now = time.time_ns()  # by ourselves: file systems keep no access times, and clocks of their own that are coarse
    os.utime(path, ns=(now, now))


def _number(file: BinaryIO) -> int | None:
    text = os.pread(file.fileno(), _DIGITS, 0).strip()
    return int(text) if text.isdigit() else None


def _set_number(file: BinaryIO, number: int | None) -> None:
    # Written over and never cut: ext4 sends a file that is cut and written again to the disk, which takes milliseconds.
    text = "unknown" if number is None else str(number)
    os.pwrite(file.fileno(), text.rjust(_DIGITS).encode(), 0)
