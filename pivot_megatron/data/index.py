"""The index of a folder of shards: `index.json` names its tars with their checksums, `index.parquet` every sample's bytes.

With both, any sample is one read at a known place, and a folder opens without a look into its tars. `index.json` is written
last, so a folder that has one is complete. What is broken is a sample with a problem and keeps its place in the order.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pivot_megatron.data.images import ImageError, decode_rgb, image_size_of
from pivot_megatron.data.members import Member, Problem, Span, scan, shown
from pivot_megatron.data.sample import BadSample, parse_sample, require_preference
from pivot_megatron.data.storage import LocalFolder, Storage
from pivot_megatron.errors import UserError

INDEX_NAME = "index.json"
SAMPLES_NAME = "index.parquet"
INDEX_VERSION = 2
MOST_JSON = 1 << 24
MOST_IMAGE = 1 << 28
"""Bytes of a member. What is larger is no sample but a mistake, and reading it would stall a run."""

_PARTIAL = ".partial"
_PARTS = ("json", "image", "rejected")
_NUMBERS = [f"{part}_{what}" for part in _PARTS for what in ("offset", "size")]
_SIZES = [f"{part}_{what}" for part in _PARTS[1:] for what in ("width", "height")]
_NAMES = [f"{part}_name" for part in _PARTS[1:]]
_SCHEMA = pa.schema(
    [("key", pa.string()), ("shard", pa.int32())]
    + [(name, pa.int64()) for name in _NUMBERS]  # no such member: an offset of -1
    + [(name, pa.int32()) for name in _SIZES]  # pixels; 0 without an image
    + [
        (name, pa.int64()) for name in _NAMES
    ]  # of an image's bytes; 0 without one. Indexes of before have no such columns
    + [("reason", pa.string()), ("detail", pa.string())]  # null where nothing is wrong
)


@dataclass(frozen=True)
class Shard:
    """One line of `index.json`: a tar's file name, sample count, size in bytes and SHA-256 (hex)."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Entry:
    """A line of `index.parquet`, but for its shard. `sizes`: width and height in pixels of the image and the rejected one;
    `names`: 64 bits of a digest of each, by which samples over one image are known."""

    member: Member
    sizes: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    names: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class TarIndex:
    """What a tar adds to an index. `ignored`: members that are no part of a sample, by extension."""

    shard: Shard
    entries: tuple[Entry, ...]
    ignored: Counter[str]


@dataclass(frozen=True)
class Index:
    """`numbers`: `[N]`, each sample's shard. `spans`: `[N, 3, 2]`, offset and size of its json, image and rejected image.
    `sizes`: `[N, 2, 2]`, width and height of the images. `names`: `[N, 2]`, what images of the same bytes have in common, 0
    where it is not known. `problems`: of the samples that have one."""

    shards: tuple[Shard, ...]
    keys: tuple[str, ...]
    # Arrays and not objects: millions of samples, copied into every loader process.
    numbers: np.ndarray
    spans: np.ndarray
    sizes: np.ndarray
    names: np.ndarray
    problems: dict[int, Problem]


def index_tar(path: Path, decode: bool) -> TarIndex:
    """Look at every sample of a tar; with `decode` also decode its images. Damage is told in the entries' problems.

    Raises UserError where the file cannot be read at all.
    """
    ignored: Counter[str] = Counter()
    if not path.is_file():  # to open a pipe is to wait for somebody to write to it
        raise UserError(f"expected a tar file at {path}, found none, or something else")
    try:
        with path.open("rb") as file:
            entries = tuple(_entry(member, file, decode) for member in scan(file, path.name, ignored))
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"expected to read {path}, found: {error.strerror}") from None
    return TarIndex(Shard(path.name, len(entries), size, digest), entries, ignored)


def _entry(member: Member, file: BinaryIO, decode: bool) -> Entry:
    if member.problem:
        return Entry(member)
    try:
        image, rejected = (_bytes(member.key, file, span, MOST_IMAGE) for span in (member.image, member.rejected))
        text = _bytes(member.key, file, member.json, MOST_JSON) or b""
        require_preference(parse_sample(member.key, text, image, rejected))
        sizes = [_checked(member.key, one, decode) for one in (image, rejected)]
    except BadSample as bad:
        return Entry(Member(member.key, problem=Problem(bad.reason, shown(bad.detail))))
    return Entry(member, (sizes[0], sizes[1]), (_name(image), _name(rejected)))


def _name(image: bytes | None) -> int:
    if image is None:
        return 0
    return int.from_bytes(hashlib.blake2b(image, digest_size=8).digest(), "big", signed=True)


def _bytes(key: str, file: BinaryIO, span: Span | None, most: int) -> bytes | None:
    if span is None:
        return None
    if span.size > most:
        raise BadSample(key, "too_large", f"a member of {span.size} bytes; at most {most} are read")
    file.seek(span.offset)
    return file.read(span.size)


def _checked(key: str, image: bytes | None, decode: bool) -> tuple[int, int]:
    if image is None:
        return 0, 0
    try:
        return decode_rgb(image).size if decode else image_size_of(io.BytesIO(image))
    except ImageError as error:
        raise BadSample(key, "bad_image", error.detail) from None


def tars_of(folder: Path) -> list[Path]:
    """Raises UserError where there are none."""
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise UserError(f"expected tar files in {folder}, found none: give the folder that holds the shards")
    return tars


def write_index(folder: Path, tars: Iterable[TarIndex]) -> Index:
    """Write the index of `folder` over what was found in its tars, in their order. Returns it as it will be read."""
    parts = list(tars)
    table = pa.Table.from_pylist(list(_rows(parts)), schema=_SCHEMA)
    samples = folder / f".{SAMPLES_NAME}{_PARTIAL}"
    pq.write_table(table, samples)
    digest = hashlib.sha256(samples.read_bytes()).hexdigest()
    about = {
        "version": INDEX_VERSION,
        "shards": [vars(part.shard) for part in parts],
        "samples": {"file": SAMPLES_NAME, "sha256": digest},
        "ignored": dict(sorted(sum((part.ignored for part in parts), Counter[str]()).items())),
    }
    temporary = folder / f".{INDEX_NAME}{_PARTIAL}"
    temporary.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    (folder / INDEX_NAME).unlink(missing_ok=True)  # between the two files there is none that could mislead
    samples.replace(folder / SAMPLES_NAME)
    temporary.replace(folder / INDEX_NAME)
    return read_index(LocalFolder(folder))


def _rows(parts: Sequence[TarIndex]) -> Iterator[dict[str, object]]:
    seen: dict[str, str] = {}
    for number, part in enumerate(parts):
        for entry in part.entries:
            member = _once(seen, entry.member, shown(part.shard.name))
            row: dict[str, object] = {"key": member.key, "shard": number}
            for name, span in zip(_PARTS, (member.json, member.image, member.rejected), strict=True):
                row |= {f"{name}_offset": span.offset if span else -1, f"{name}_size": span.size if span else 0}
            row |= dict(zip(_SIZES, (side for size in entry.sizes for side in size), strict=True))
            row |= dict(zip(_NAMES, entry.names, strict=True))
            problem = member.problem
            yield row | {"reason": problem and problem.reason, "detail": problem and problem.detail}


def _once(seen: dict[str, str], member: Member, tar: str) -> Member:
    """`member`, or where its key is taken, a problem under a key of its own."""
    if before := seen.get(member.key):
        problem = Problem("duplicate_key", f"the key {member.key} is in {before} and again in {tar}")
        return Member(f"{member.key}@{tar}", problem=problem)
    seen[member.key] = tar
    return member


def read_index(folder: Storage) -> Index:
    """Raises UserError where it is not one, or where the folder's tars are not those it was made of."""
    repair = (
        "run `pivot data index` on a copy of it on disk, and copy index.json and index.parquet back"
        if "://" in folder.where
        else f"run: pivot data index {folder.where}"
    )
    sizes = folder.sizes()
    if INDEX_NAME not in sizes:
        raise UserError(f"expected {INDEX_NAME} in {folder.where}, found none: {repair}")
    where = f"{folder.where}/{INDEX_NAME}"
    try:
        about = json.loads(folder.read(INDEX_NAME))
        version, rows = about["version"], about["shards"]
        shards = tuple(Shard(str(r["name"]), int(r["samples"]), int(r["bytes"]), str(r["sha256"])) for r in rows)
        if version != INDEX_VERSION:
            raise UserError(f"expected version {INDEX_VERSION} in {where}, found {version!r}: {repair}")
        digest = about["samples"]["sha256"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"expected a shard index in {where}, found something else ({error!r}): {repair}") from error
    _require_tars(folder.where, shards, sizes, repair)
    if SAMPLES_NAME not in sizes:
        raise UserError(f"expected {SAMPLES_NAME} in {folder.where}, found none: {repair}")
    samples = folder.read(SAMPLES_NAME)
    if hashlib.sha256(samples).hexdigest() != digest:
        raise UserError(f"expected {folder.where}/{SAMPLES_NAME} as {INDEX_NAME} says, found another: {repair}")
    index = _index(shards, pq.read_table(pa.BufferReader(samples)))
    found = np.bincount(index.numbers, minlength=len(shards)).tolist()
    if found != [shard.samples for shard in shards]:
        told = sum(shard.samples for shard in shards)
        raise UserError(
            f"expected {told} samples in {folder.where}, as {INDEX_NAME} says, found {sum(found)}: {repair}"
        )
    return index


def _require_tars(where: str, shards: Sequence[Shard], sizes: Mapping[str, int], repair: str) -> None:
    unlisted = {name for name in sizes if name.endswith(".tar")} - {shard.name for shard in shards}
    if unlisted:
        raise UserError(f"expected every tar of {where} in {INDEX_NAME}, found {min(unlisted)} missing: {repair}")
    for shard in shards:
        if shard.name not in sizes:
            raise UserError(f"expected {shard.name} in {where}, as {INDEX_NAME} says, found none: copy it again")
        if sizes[shard.name] != shard.bytes:
            raise UserError(
                f"expected {shard.bytes} bytes in {where}/{shard.name}, as {INDEX_NAME} says, found {sizes[shard.name]}: "
                f"copy it again, or {repair}"
            )


def _index(shards: tuple[Shard, ...], table: pa.Table) -> Index:
    def columns(names: Sequence[str], dtype: type) -> np.ndarray:
        found: np.ndarray = np.stack([table.column(name).to_numpy() for name in names], axis=1)
        return found.astype(dtype).reshape(len(table), len(names) // 2, 2)

    reasons = table.column("reason").combine_chunks()
    wrong = np.flatnonzero(reasons.is_valid().to_numpy(zero_copy_only=False))
    rows = table.select(["reason", "detail"]).take(pa.array(wrong, type=pa.int64())).to_pylist()
    return Index(
        shards=shards,
        keys=tuple(table.column("key").to_pylist()),
        numbers=table.column("shard").to_numpy(),
        spans=columns(_NUMBERS, np.int64),
        sizes=columns(_SIZES, np.int32),
        names=columns(_NAMES, np.int64)[:, 0]
        if _NAMES[0] in table.column_names
        else np.zeros((len(table), 2), np.int64),
        problems={int(at): Problem(row["reason"], row["detail"]) for at, row in zip(wrong, rows, strict=True)},
    )
