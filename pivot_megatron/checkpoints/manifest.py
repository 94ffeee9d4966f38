"""`files.json`: what a checkpoint's files were when they were written, so that any damage since is seen before it is used.

Of each file its bytes, and the CRC-32 of each of its blocks: ranks share the checking of a large file, and what is read of one
can be checked alone. CRC-32 is the standard library's (zlib), lets other threads run while it counts, and sees what disks, cables
and copies do to files; it is no defence against a person.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pivot_megatron.errors import UserError

MANIFEST = "files.json"
BLOCK = 1 << 26
"""Bytes of a file that share a checksum."""
_READ = 1 << 22  # bytes at once
_AHEAD = 4  # blocks


@dataclass(frozen=True)
class FileSum:
    """Bytes of a file, and the CRC-32 of each block of `BLOCK` bytes, the last of which may be shorter."""

    bytes: int
    crc32: tuple[int, ...]


class Sum:
    """A file's checksums as its bytes come by, from its beginning on."""

    def __init__(self) -> None:
        self._bytes = 0
        self._blocks: list[int] = []

    def add(self, data: bytes | bytearray | memoryview) -> None:
        rest = memoryview(data).cast("B")
        while rest:
            room = BLOCK - self._bytes % BLOCK
            if room == BLOCK:
                self._blocks.append(0)
            self._blocks[-1] = zlib.crc32(rest[:room], self._blocks[-1])
            self._bytes += len(rest[:room])
            rest = rest[room:]

    def done(self) -> FileSum:
        return FileSum(self._bytes, tuple(self._blocks))


def sum_file(path: Path) -> FileSum:
    found = Sum()
    buffer = memoryview(bytearray(_READ))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            found.add(buffer[:count])
    return found.done()


@dataclass(frozen=True, order=True)
class Block:
    """The `number`-th block of a file, named as in the manifest."""

    file: str
    number: int


@dataclass(frozen=True)
class Manifest:
    """Files by their paths in the checkpoint's folder."""

    files: Mapping[str, FileSum]

    @classmethod
    def read(cls, checkpoint: Path) -> Manifest:
        path = checkpoint / MANIFEST
        try:
            told = json.loads(path.read_text())["files"]
            return cls({n: FileSum(int(f["bytes"]), tuple(int(c, 16) for c in f["crc32"])) for n, f in told.items()})
        except OSError as error:
            raise UserError(
                f"{path}: expected the list of the checkpoint's files, cannot read it ({error.strerror}); was the copy cut off?"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{path}: expected the list of the checkpoint's files, found something else; was the copy cut off?"
            ) from None

    def write(self, checkpoint: Path) -> None:
        told = {
            name: {"bytes": f.bytes, "crc32": [f"{c:08x}" for c in f.crc32]} for name, f in sorted(self.files.items())
        }
        (checkpoint / MANIFEST).write_text(json.dumps({"block": BLOCK, "files": told}, indent=1) + "\n")

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())

    def blocks(self, files: Iterable[str]) -> list[Block]:
        """All of these files."""
        return [Block(name, number) for name in sorted(files) for number in range(len(self.files[name].crc32))]

    def require_sizes(self, checkpoint: Path) -> None:
        """Raises UserError naming a file that is missing or has another size."""
        for name, expected in self.files.items():
            path = checkpoint / name
            found = f"{path.stat().st_size}" if path.is_file() else "no such file"
            if found != f"{expected.bytes}":
                raise UserError(f"{path}: expected {expected.bytes} bytes, found {found}; was the copy cut off?")

    def require_sound(self, checkpoint: Path, blocks: Iterable[Block]) -> None:
        """Raises UserError naming a file whose bytes are no longer those that were written."""
        with ThreadPoolExecutor() as pool:  # counting lets other threads run
            for problem in pool.map(lambda block: self.damage(checkpoint, block), blocks):
                if problem:
                    raise UserError(problem)

    def damage(self, checkpoint: Path, block: Block) -> str | None:
        """In words for a user; None where its bytes are those that were written."""
        path, start = checkpoint / block.file, block.number * BLOCK
        expected, found, left = self.files[block.file].crc32[block.number], 0, BLOCK
        buffer = memoryview(bytearray(min(_READ, self.files[block.file].bytes)))
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(start)
                while left and (count := file.readinto(buffer[: min(_READ, left)])):
                    found, left = zlib.crc32(buffer[:count], found), left - count
        except OSError as error:
            return f"{path}: cannot read ({error.strerror}); was the copy cut off?"
        if found == expected:
            return None
        return (
            f"{path}: expected CRC-32 {expected:08x} of the {BLOCK - left} bytes from {start} on, found {found:08x}: "
            "they changed since they were written; restore the file, or remove its checkpoint to go on from an earlier one"
        )


class CheckedAhead:
    """Blocks of a checkpoint that is read from front to back: each is checked once, in a thread, some ahead of those asked for.

    What the thread reads from the disk, the reader then finds in memory.
    """

    def __init__(self, checkpoint: Path, manifest: Manifest) -> None:
        self._checkpoint, self._manifest = checkpoint, manifest
        self._pool = ThreadPoolExecutor(1)
        self._found: dict[Block, Future[str | None]] = {}

    def require(self, blocks: Sequence[Block]) -> None:
        """Raises UserError where one is not as it was written."""
        last = blocks[-1]
        for block in (*blocks, *(Block(last.file, last.number + n) for n in range(1, _AHEAD + 1))):
            if block not in self._found and block.number < len(self._manifest.files[block.file].crc32):
                self._found[block] = self._pool.submit(self._manifest.damage, self._checkpoint, block)
        for block in blocks:
            if problem := self._found[block].result():
                raise UserError(problem)


def blocks_of_range(file: str, start: int, length: int) -> list[Block]:
    """Those that `length` bytes from `start` on lie in."""
    return [Block(file, number) for number in range(start // BLOCK, -(-(start + length) // BLOCK))]
