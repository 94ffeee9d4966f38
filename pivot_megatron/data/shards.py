"""WebDataset tars with random access: a writer, an index beside the tars, and a reader.

A folder holds `*.tar` files and `index.json`. A sample is `KEY.json` and, unless it is text only, one image
`KEY.jpg|jpeg|png|webp`; a pair that prefers one image to another also holds `KEY.rejected.jpg|…`. The index is written
last, so a folder with an index is complete.

webdataset writes the tars, so they are what every WebDataset tool expects. It reads them as streams only: version 1.x
keeps no random access, which a global order and an exact resume need. So the standard library's tarfile reads the
headers once, and the reader seeks from there.
"""

import hashlib
import io
import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from pivot_megatron.data.images import image_size_of
from pivot_megatron.data.sample import Sample, parse_sample
from pivot_megatron.errors import RunError, UserError

INDEX_NAME = "index.json"
INDEX_VERSION = 1
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")

_REJECTED = "rejected."
_PARTIAL = ".partial"
_MAX_OPEN_TARS = 64


@dataclass(frozen=True)
class Shard:
    """One line of the index: a tar's file name, sample count, size in bytes and SHA-256 (hex)."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class _Member:
    """Where a sample's data lies in its tar: byte offsets and sizes. No image: an offset of -1."""

    key: str
    json_offset: int
    json_size: int
    image_offset: int
    image_size: int
    rejected_offset: int
    rejected_size: int

    @property
    def spans(self) -> tuple[int, ...]:
        return (
            *(self.json_offset, self.json_size),
            *(self.image_offset, self.image_size),
            *(self.rejected_offset, self.rejected_size),
        )


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

    def __enter__(self) -> "ShardWriter":
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
        shards = []
        for number, count in enumerate(self._counts):
            final = shard_path(self._directory, number)
            partial_path(final).replace(final)
            shards.append(_describe(final, count))
        _write_index_file(self._directory, shards)

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


def write_index(directory: str | Path) -> Sequence[Shard]:
    """Scan every `*.tar` of a folder, in order of name, and write its index. Returns the index's lines.

    Raises UserError for a folder without tars and for whatever ShardReader would refuse.
    """
    folder = Path(directory)
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise UserError(f"expected tar files in {folder}, found none: give the folder that holds the shards")
    shards = []
    seen: set[str] = set()
    for tar in tars:
        members = _scan(tar)
        _require_new_keys(seen, members, tar)
        shards.append(_describe(tar, len(members)))
    _write_index_file(folder, shards)
    return shards


class ShardReader:
    """Random access to the samples of a folder of shards, in the order of the index.

    Opening reads every tar header once. Tars are opened on first use; a reader may be pickled, forked, and read from
    threads. Raises UserError where the folder and its index do not agree.
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        self._shards = _read_index(self._directory)
        self._open: OrderedDict[int, _OpenTar] = OrderedDict()
        keys: list[str] = []
        numbers: list[int] = []
        spans: list[tuple[int, ...]] = []
        seen: set[str] = set()
        for number, shard in enumerate(self._shards):
            members = _scan_listed(self._directory, shard)
            _require_new_keys(seen, members, self._directory / shard.name)
            for member in members:
                keys.append(member.key)
                numbers.append(number)
                spans.append(member.spans)
        self._keys = tuple(keys)
        # Arrays and not objects: millions of samples, copied into every loader process.
        self._numbers = np.array(numbers, dtype=np.int32)
        self._spans = np.array(spans, dtype=np.int64).reshape(-1, 6)

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def keys(self) -> Sequence[str]:
        """The samples' keys, in order."""
        return self._keys

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the tars' checksums in order: names the data, whatever folder and tars are called."""
        return hashlib.sha256("".join(shard.sha256 for shard in self._shards).encode()).hexdigest()

    def read(self, position: int, images: bool = True) -> Sample:
        """The sample at `position`, 0 ≤ position < len; without `images` those it has are empty bytes.

        Raises IndexError, BadSample, and RunError for a lost tar.
        """
        if not 0 <= position < len(self):
            raise IndexError(f"sample {position} of {len(self)}")
        json_span, *image_spans = self._spans[position].reshape(3, 2).tolist()
        tar = self._tar(int(self._numbers[position]))
        image, rejected = (
            None if offset < 0 else tar.read(offset, size) if images else b"" for offset, size in image_spans
        )
        return parse_sample(self._keys[position], tar.read(*json_span), image, rejected)

    def image_sizes(self, position: int) -> list[tuple[int, int]]:
        """Width and height in pixels of a sample's images, the rejected one last; only the heads of the files are read.

        Raises ImageError, and RunError for a lost tar.
        """
        tar = self._tar(int(self._numbers[position]))
        spans = self._spans[position].reshape(3, 2).tolist()[1:]
        return [image_size_of(io.BufferedReader(_Span(tar, *span))) for span in spans if span[0] >= 0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def _tar(self, number: int) -> "_OpenTar":
        tar = self._open.get(number)
        if tar is None:
            tar = _OpenTar(self._directory / self._shards[number].name)
            self._open[number] = tar
            # Large data sets have more tars than a process may have files open. A tar that is dropped here while
            # another thread reads from it closes when that thread lets go of it.
            while len(self._open) > _MAX_OPEN_TARS:
                self._open.popitem(last=False)
        return tar


class _OpenTar:
    """A file read by position. There is no shared seek pointer, so threads and forked processes do not disturb it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise RunError(f"expected to open {path} as when the run began, found: {error.strerror}") from error

    def read(self, offset: int, size: int) -> bytes:
        data = os.pread(self._descriptor, size, offset)
        if len(data) != size:
            raise RunError(
                f"expected {size} bytes at {offset} in {self._path}, found {len(data)}: the file was changed"
            )
        return data

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


class _Span(io.RawIOBase):
    """A member of a tar as a file."""

    def __init__(self, tar: _OpenTar, offset: int, size: int) -> None:
        self._tar, self._offset, self._size, self._at = tar, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._at))
        buffer[:count] = self._tar.read(self._offset + self._at, count)
        self._at += count
        return count


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
        entry[_REJECTED + extension] = rejected_image
    return entry


def _describe(tar: Path, samples: int) -> Shard:
    with tar.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Shard(tar.name, samples, tar.stat().st_size, digest)


def _write_index_file(directory: Path, shards: Sequence[Shard]) -> None:
    index = {"version": INDEX_VERSION, "shards": [vars(shard) for shard in shards]}
    temporary = directory / f".{INDEX_NAME}{_PARTIAL}"
    temporary.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    temporary.replace(directory / INDEX_NAME)


def _read_index(directory: Path) -> tuple[Shard, ...]:
    path = directory / INDEX_NAME
    repair = f"run: pivot data index {directory}"
    if not path.is_file():
        raise UserError(f"expected {INDEX_NAME} in {directory}, found none: {repair}")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        version, rows = index["version"], index["shards"]
        shards = tuple(Shard(str(r["name"]), int(r["samples"]), int(r["bytes"]), str(r["sha256"])) for r in rows)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"expected a shard index in {path}, found something else ({error!r}): {repair}") from error
    if version != INDEX_VERSION:
        raise UserError(f"expected version {INDEX_VERSION} in {path}, found {version!r}: {repair}")
    unlisted = {tar.name for tar in directory.glob("*.tar")} - {shard.name for shard in shards}
    if unlisted:
        raise UserError(f"expected every tar of {directory} in {INDEX_NAME}, found {min(unlisted)} missing: {repair}")
    return shards


def _scan_listed(directory: Path, shard: Shard) -> list[_Member]:
    path = directory / shard.name
    if not path.is_file():
        raise UserError(f"expected {shard.name} in {directory}, as {INDEX_NAME} says, found none: copy it again")
    size = path.stat().st_size
    if size != shard.bytes:
        raise UserError(
            f"expected {shard.bytes} bytes in {path}, as {INDEX_NAME} says, found {size}: copy it again, or "
            f"run: pivot data index {directory}"
        )
    members = _scan(path)
    if len(members) != shard.samples:
        raise UserError(
            f"expected {shard.samples} samples in {path}, as {INDEX_NAME} says, found {len(members)}: "
            f"run: pivot data index {directory}"
        )
    return members


def _scan(path: Path) -> list[_Member]:
    """Read a tar's headers: its samples in order of first appearance. Raises UserError."""
    parts: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        # "r:" refuses compression, under which offsets mean nothing.
        with tarfile.open(path, "r:") as tar:
            while (info := tar.next()) is not None:
                # tarfile keeps every header it has seen; a big shard's would fill the memory of every process.
                tar.members.clear()  # type: ignore[attr-defined]
                if info.isfile():
                    key, extension = _split_name(path, info.name)
                    sample = parts.setdefault(key, {})
                    kind = _kind(extension)
                    if kind in sample:
                        raise UserError(
                            f"expected one {kind} for each key, found two for {key} in {path}: write the shard again"
                        )
                    sample[kind] = (info.offset_data, info.size)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(
            f"expected an uncompressed tar at {path}, found something else ({error}): write the shard again"
        ) from error
    return [_member(path, key, sample) for key, sample in parts.items()]


def _split_name(path: Path, name: str) -> tuple[str, str]:
    folder, _, base = name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    extension = extension.lower()
    if not stem or extension.removeprefix(_REJECTED) not in ("json", *IMAGE_EXTENSIONS) or extension == "rejected.json":
        raise UserError(
            f"expected KEY.json, KEY.{'|'.join(IMAGE_EXTENSIONS)} or KEY.rejected.jpg|… in {path}, found {name}: "
            f"write the shard without it"
        )
    return (f"{folder}/{stem}" if folder else stem), extension


def _kind(extension: str) -> str:
    if extension == "json":
        return "json"
    return "rejected image" if extension.startswith(_REJECTED) else "image"


def _member(path: Path, key: str, sample: Mapping[str, tuple[int, int]]) -> _Member:
    if "json" not in sample:
        raise UserError(f"expected {key}.json beside the image {key} in {path}, found none: write the shard again")
    nothing = (-1, 0)
    return _Member(key, *sample["json"], *sample.get("image", nothing), *sample.get("rejected image", nothing))


def _require_new_keys(seen: set[str], members: Sequence[_Member], path: Path) -> None:
    for member in members:
        if member.key in seen:
            raise UserError(
                f"expected every key once, found {member.key} in {path} and in a shard before it: "
                f"give the samples keys of their own"
            )
        seen.add(member.key)
