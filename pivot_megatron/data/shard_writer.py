"""Writing WebDataset tars, and their index beside them.

webdataset writes the tars, so they are what every WebDataset tool expects. It reads them as streams only: version 1.x
keeps no random access, which a global order and an exact resume need, and the index gives.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from pivot_megatron.data.index import INDEX_NAME, index_tar, write_index
from pivot_megatron.data.members import IMAGE_EXTENSIONS, REJECTED
from pivot_megatron.errors import UserError

_PARTIAL = ".partial"


class ShardWriter:
    """Writes `shard-000000.tar`, … and, when its block ends without an error, `index.json`.

    The same samples in the same order give the same bytes. Until the end the tars are named `*.partial`; after an
    error nothing remains. Raises UserError where the folder already holds tars or an index.
    """

    def __init__(self, directory: str | Path, samples_per_shard: int) -> None:
        if samples_per_shard < 1:
            raise UserError(f"expected at least 1 sample per shard, found {samples_per_shard}")
        self._directory = Path(directory)
        self._samples_per_shard = samples_per_shard
        self._keys: set[str] = set()
        self._counts: list[int] = []
        self._file: IO[bytes] | None = None
        self._tar: Any = None

    def __enter__(self) -> ShardWriter:
        self._directory.mkdir(parents=True, exist_ok=True)
        found = sorted(path.name for path in self._directory.glob("*.tar"))
        if found or (self._directory / INDEX_NAME).exists():
            raise UserError(
                f"expected a folder without shards at {self._directory}, found {found[0] if found else INDEX_NAME}: "
                f"choose another folder, or remove what is there"
            )
        self._remove_partials()
        return self

    def write(
        self,
        key: str,
        image_bytes: bytes | None,
        extension: str,
        record: Mapping[str, Any],
        rejected_image: bytes | None = None,
    ) -> None:
        """Add one sample. `extension` names the images' format (`jpg`, `png`, `webp`) and is unused without one.

        Raises UserError for a key that was written before or that WebDataset would split, and for another extension.
        """
        entry = _entry(key, image_bytes, extension, record, rejected_image)
        if key in self._keys:
            raise UserError(f"expected every key once, found {key!r} twice, writing to {self._directory}")
        if self._tar is None or self._counts[-1] == self._samples_per_shard:
            self._close_tar()
            self._open_tar()
        self._tar.write(entry)
        self._keys.add(key)
        self._counts[-1] += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_tar()
        if kind is not None:
            self._remove_partials()
            return
        finals = [shard_path(self._directory, number) for number in range(len(self._counts))]
        for final in finals:
            partial_path(final).replace(final)
        write_index(self._directory, (index_tar(final, decode=False) for final in finals))

    def _open_tar(self) -> None:
        path = partial_path(shard_path(self._directory, len(self._counts)))
        self._file = path.open("wb")
        self._tar = _tar_writer(self._file)
        self._counts.append(0)

    def _close_tar(self) -> None:
        if self._tar is not None and self._file is not None:
            self._tar.close()
            self._file.close()
            self._tar = self._file = None

    def _remove_partials(self) -> None:
        for path in self._directory.glob(f"shard-*.tar{_PARTIAL}"):
            path.unlink()


@contextmanager
def open_shard(path: Path) -> Iterator[Callable[[str, bytes | None, str, Mapping[str, Any]], None]]:
    """One tar at `path`; what it yields adds a sample as `ShardWriter.write` does, and the bytes are the same.

    For work that goes on where it was killed: the caller opens `partial_path`, renames, and indexes at the end. Keys are
    not compared. Raises UserError.
    """
    with path.open("wb") as file:
        tar = _tar_writer(file)
        try:
            yield lambda key, image, extension, record: tar.write(_entry(key, image, extension, record, None))
        finally:
            tar.close()  # before the file is, also where writing failed


def shard_path(directory: Path, number: int) -> Path:
    return directory / f"shard-{number:06d}.tar"


def partial_path(path: Path) -> Path:
    """Where a shard is written until it is whole."""
    return path.with_name(path.name + _PARTIAL)


def _tar_writer(file: IO[bytes]) -> Any:
    # Here and not at the top of the file: webdataset imports much of torch, and readers need none of it.
    from webdataset.writer import TarWriter  # type: ignore[import-untyped]

    return TarWriter(file, encoder=False, mtime=0, user="pivot", group="pivot")


def _entry(
    key: str, image: bytes | None, extension: str, record: Mapping[str, Any], rejected_image: bytes | None
) -> dict[str, Any]:
    if not key or "." in key or key.startswith(("/", "_")) or key.endswith("/"):
        raise UserError(f"expected a key without dots, found {key!r}: WebDataset splits names at the first dot")
    if image is not None and extension not in IMAGE_EXTENSIONS:
        raise UserError(f"expected an image extension of {', '.join(IMAGE_EXTENSIONS)}, found {extension!r}")
    entry: dict[str, Any] = {"__key__": key, "json": json.dumps(record, ensure_ascii=False).encode("utf-8")}
    if image is not None:
        entry[extension] = image
    if rejected_image is not None:
        entry[REJECTED + extension] = rejected_image
    return entry
