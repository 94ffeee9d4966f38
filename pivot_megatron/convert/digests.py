"""SHA-256 of files, kept for large ones, so that weights are read for their name once and not whenever a run starts.

What is kept is taken for a file of the same path, size, inode and times of its last writing and last change. The last of these
(ctime) no program sets: a file that was overwritten in place and given its old date back is read again.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from contextlib import suppress
from pathlib import Path

from pivot_megatron.errors import UserError
from pivot_megatron.user_cache import cache_folder

LARGE = 1 << 24
"""Bytes from which on a digest is kept."""
_SETTLED = 2.0
"""Seconds since a file's last change from which on another one has another time, on the coarsest file systems too."""


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of what is in it. Raises UserError where it cannot be read."""
    try:
        stamp = _stamp(path)
        if stamp[0] < LARGE:
            return _read(path)
        note = cache_folder("digests") / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]}.json"
        kept = _kept(note, stamp)
        if kept is not None:
            return kept
        digest = _read(path)
        if stamp == _stamp(path) and time.time() - max(stamp[2:]) / 1e9 > _SETTLED:
            _keep(note, stamp, digest)
    except OSError as error:
        raise UserError(f"{path}: cannot read ({error.strerror}); was the copy cut off?") from None
    return digest


def _stamp(path: Path) -> list[int]:
    """Size, inode, and nanoseconds of the last writing and the last change."""
    told = path.stat()
    return [told.st_size, told.st_ino, told.st_mtime_ns, told.st_ctime_ns]


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _kept(note: Path, stamp: list[int]) -> str | None:
    try:
        told = json.loads(note.read_text())
        return str(told["sha256"]) if told["stamp"] == stamp else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(note: Path, stamp: list[int], digest: str) -> None:
    part = note.with_name(f"{uuid.uuid4().hex}.part")
    with suppress(OSError):  # a home that cannot be written to costs the next start its time, and nothing else
        note.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"stamp": stamp, "sha256": digest}))
        part.replace(note)
