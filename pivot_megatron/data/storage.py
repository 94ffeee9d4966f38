"""Where a folder of shards lies: read by name and by range of bytes."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from pivot_megatron.errors import RunError, UserError

_MAX_OPEN = 64


class Storage(Protocol):
    """A folder, from any thread; a copy in another process opens its own files.

    Attributes: `where`, the folder as a person would write it; `whole_up_to`, the bytes up to which a sample is better read
    whole, even where only its text is wanted.
    """

    where: str
    whole_up_to: int

    @property
    def beside(self) -> Path:
        """Where files that are made from its samples are kept. Raises UserError where no place was given."""
        ...

    def sizes(self) -> Mapping[str, int]:
        """Bytes of every file of the folder, by name. Raises UserError where there is no such folder."""
        ...

    def read(self, name: str) -> bytes:
        """A whole file. Raises UserError where there is none."""
        ...

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """Raises RunError where the file has gone or is shorter."""
        ...

    def warm(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        """Get these (name, offset, size) ready to be read soon, together, where one after another would take long.

        Raises what `read_range` does.
        """
        ...


class LocalFolder:
    """A folder of this machine's file system."""

    whole_up_to = 0

    def __init__(self, path: Path) -> None:
        self.path = path
        self.where = str(path)
        self._open: OrderedDict[str, _OpenFile] = OrderedDict()

    @property
    def beside(self) -> Path:
        return self.path

    def sizes(self) -> Mapping[str, int]:
        try:
            with os.scandir(self.path) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        except OSError as error:
            raise UserError(f"expected a folder of shards at {self.path}, found none ({error.strerror})") from None

    def read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise UserError(f"expected to read {self.path / name}, found: {error.strerror}") from None

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        file = self._open.get(name)
        if file is None:
            file = self._open[name] = _OpenFile(self.path / name)
            # Large data sets have more tars than a process may have files open. A file that is dropped here while
            # another thread reads from it closes when that thread lets go of it.
            while len(self._open) > _MAX_OPEN:
                self._open.popitem(last=False)
        return file.read(offset, size)

    def warm(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        """Nothing: a local file is soon read."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}


class _OpenFile:
    """A file read by position. There is no shared seek pointer, so threads and forked processes do not disturb it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise RunError(f"expected to open {path} as when the run began, found: {error.strerror}") from error

    def read(self, offset: int, size: int) -> bytes:
        try:
            data = os.pread(self._descriptor, size, offset)
        except OSError as error:
            raise RunError(f"expected to read {self._path}, found: {error.strerror}") from error
        if len(data) != size:
            raise RunError(
                f"expected {size} bytes at {offset} in {self._path}, found {len(data)}: the file was changed"
            )
        return data

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
