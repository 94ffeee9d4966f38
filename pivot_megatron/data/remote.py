"""Shards behind a URL, read by ranges through a bounded cache on this machine's disk.

What is asked for and kept is exactly a sample's bytes, its json and images together. Samples are read in a shuffled order:
of a block of 4 MiB some forty samples of 100 kB would be fetched for each that is used, and nearly all of them be gone again
from a cache smaller than the data. That makes many small requests, so they are made many at once (`warm`).
"""

from __future__ import annotations

import hashlib
import os
import random
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pivot_megatron.config.schema import ShardCache
from pivot_megatron.data.range_cache import RangeCache
from pivot_megatron.data.remote_files import RemoteFiles
from pivot_megatron.data.storage import LocalFolder, Storage
from pivot_megatron.errors import RunError, UserError

WHOLE_UP_TO = 1 << 20
"""Bytes of a sample that are fetched with its text and kept: every rank reads the text, one that shares the cache the image
soon after, and S3 sends so many in less than the time that a second request waits for its first byte."""

AT_ONCE = 16
"""Requests of one process."""


def storage_of(where: str, cache: ShardCache | None) -> Storage:
    """The folder at a path, or at a URL that fsspec knows. Raises UserError and RunError."""
    if "://" not in where:
        return LocalFolder(Path(where))
    return RemoteFolder(where, cache)


class RemoteFolder:
    """The folder at `url` as it was when opened. Without a cache every read is a request, and nothing can lie beside it.

    Raises UserError where it cannot be listed or the cache not be written to, RunError where no answer comes.
    """

    def __init__(self, url: str, cache: ShardCache | None) -> None:
        self.where = url.rstrip("/")
        self.whole_up_to = WHOLE_UP_TO if cache else 0
        self._ranges = RangeCache(cache.folder / "ranges", int(cache.gib * 2**30)) if cache else None
        self._beside = _folder(cache.folder / "beside" / _named(self.where)) if cache else None
        self._remote = RemoteFiles(self.where)

    @property
    def beside(self) -> Path:
        if self._beside is None:
            raise UserError(f"data.cache: needed for {self.where}, and for what is made from its samples")
        return self._beside

    def sizes(self) -> Mapping[str, int]:
        return {name: file.size for name, file in self._remote.files.items()}

    def read(self, name: str) -> bytes:
        if name not in self._remote.files:
            raise UserError(f"expected {self.where}/{name}, found no such file")
        return self.read_range(name, 0, self._remote.files[name].size)

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """Raises RunError where the file has gone, or is another than when the folder was opened, or no answer comes."""
        if self._ranges is None:
            return self._remote.fetch(name, offset, size)
        return self._ranges.get(self._key(name, offset, size), lambda: self._remote.fetch(name, offset, size))

    def warm(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        if self._ranges is None:
            return
        missing = [one for one in ranges if not self._ranges.holds(self._key(*one))]
        # Ranks that share the cache want the same samples at the same time: in an order of their own they divide them.
        random.Random(os.getpid()).shuffle(missing)
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="warm") as pool:
            futures = [pool.submit(self.read_range, *one) for one in missing]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _key(self, name: str, offset: int, size: int) -> str:
        """With the file's version: bytes of a file that was replaced are never found again."""
        if name not in self._remote.files:
            raise RunError(f"expected {self.where}/{name} as when the run began, found no such file")
        file = self._remote.files[name]
        return f"{self.where}/{name} {file.size} {file.version} {offset}+{size}"


def _named(url: str) -> str:
    """A folder name that tells a person which URL it is for, and is no other's."""
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", url.partition("://")[2])[-60:].strip("-.")
    return f"{readable}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.cache.folder: expected to write to {path}, found: {error.strerror}") from None
    return path
