"""Where samples lie in a tar: its members by key, and every kind of damage as a sample with a problem.

A sample is `KEY.json` and, unless it is text only, one image `KEY.jpg|jpeg|png|webp`; a pair that prefers one image to
another also holds `KEY.rejected.jpg|…`. WebDataset tars hold other members too; those are counted and left alone.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
REJECTED = "rejected."

_BLOCK = tarfile.BLOCKSIZE
_MOST_EXTENSION = 1 << 16
"""Bytes of names and attributes before a member. tarfile reads them whole, and some of them in quadratic time."""
_MOST_PADDING = 1 << 16
"""Zeros after the last member. Writers fill up records of 10 KiB; a tar that was never written to its end has more."""
_MOST_NAME = 4096
_RENAMING = frozenset(("path", "size", "linkpath"))
"""What a header for all members must not say: every one of them would be the same."""
_RECORDS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENSIONS = (*_RECORDS, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_KINDS: Mapping[str, str] = {"json": "json"} | {
    prefix + extension: kind
    for prefix, kind in (("", "image"), (REJECTED, "rejected"))
    for extension in IMAGE_EXTENSIONS
}


@dataclass(frozen=True)
class Span:
    """Bytes of a tar."""

    offset: int
    size: int

    @property
    def end(self) -> int:
        return self.offset + self.size

    def holds(self, other: Span) -> bool:
        return self.offset <= other.offset and other.end <= self.end


@dataclass(frozen=True)
class Problem:
    """Why a sample cannot be trained on, in `BadSample`'s words."""

    reason: str
    detail: str


@dataclass(frozen=True)
class Member:
    """A sample of a tar. With a `problem` its spans mean nothing; a tar's own problem has the tar's name as its key."""

    key: str
    json: Span | None = None
    image: Span | None = None
    rejected: Span | None = None
    problem: Problem | None = None


@dataclass
class _Found:
    spans: dict[str, Span] = field(default_factory=dict)
    problem: Problem | None = None


class _Header(tarfile.TarInfo):
    """Refuses what would send tarfile round in a circle, into memory that there is not, or on with a name nobody gave."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.size < 0:
            raise tarfile.ReadError(f"a member of {self.size} bytes")
        if self.type in _EXTENSIONS and self.size > _MOST_EXTENSION:
            raise tarfile.ReadError(f"{self.size} bytes of names and attributes, at most {_MOST_EXTENSION} are read")
        if self.type in _RECORDS and (file := tar.fileobj):
            at = file.tell()
            _require_records(file.read(self.size))
            file.seek(at)
        made: tarfile.TarInfo = super()._proc_member(tar)  # type: ignore[misc]
        return made


def _require_records(data: bytes) -> None:
    """PAX records: each its own length, a name and a value. No checksum covers them, and tarfile takes much for one."""
    rest = data.rstrip(b"\0")
    while rest:
        digits = rest[:8].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        record, rest = rest[:length], rest[length:]
        if len(record) < max(length, 1) or b"=" not in record or not record.endswith(b"\n"):
            raise tarfile.ReadError("attributes of a member that are none")


def scan(file: BinaryIO, path_name: str, ignored: Counter[str]) -> list[Member]:
    """Read a tar's headers: its samples in order of first appearance, and last what is wrong with the tar itself.

    Raises nothing on damage. `ignored` counts the other members, by extension.
    """
    name = shown(path_name)
    found: dict[str, _Found] = {}
    dotted: dict[str, str] = {}
    broken: Member | None = None
    for step in _headers(file, name):
        if isinstance(step, Member):
            broken = step
        else:
            _add(found, dotted, step, ignored)
    members = [_member(key, one) for key, one in found.items()]
    members += [_dotted(key, first) for key, first in dotted.items() if key not in found]
    if not members and broken is None:
        broken = Member(name, problem=Problem("no_samples", "expected KEY.json in the tar, found none"))
    return [*members, broken] if broken else members


def _headers(file: BinaryIO, name: str) -> Iterator[tarfile.TarInfo | Member]:
    """Headers whose data are all there, and in the end, where the tar does not end as one should, a member that says so."""
    total = os.fstat(file.fileno()).st_size
    try:
        # "r:" refuses compression, under which offsets mean nothing.
        tar = tarfile.open(  # noqa: SIM115 - entered below
            fileobj=file, mode="r:", tarinfo=_Header, encoding="utf-8", errors="surrogateescape"
        )
    except Exception as error:  # on bytes nobody vetted tarfile answers with more than its own errors
        yield _broken(name, "bad_tar", f"expected an uncompressed tar, found something else ({_line(error)})")
        return
    at = 0
    with tar:
        while True:
            if tar.offset > total:
                yield _broken(
                    name, "truncated_tar", f"its last member goes on to byte {tar.offset}, the tar to {total}"
                )
                return
            try:
                info = tar.next()
            except Exception as error:
                yield _broken(
                    name, "bad_tar", f"its headers stop making sense at byte {at} ({_line(error)}), as if cut off"
                )
                return
            # tarfile keeps every header it has seen; a big shard's would fill the memory of every process.
            tar.members.clear()  # type: ignore[attr-defined]
            if info is None:
                break
            # A folder or a link may have a size and no data, and of a sparse file less is there than its size.
            if info.isreg() and not info.issparse() and info.offset_data + info.size > total:
                yield _broken(
                    name,
                    "truncated_tar",
                    f"{_key(info.name)} has {info.size} bytes from byte {info.offset_data}, the tar {total} in all",
                )
                return
            if info.size < 0 or tar.offset <= at or not _RENAMING.isdisjoint(tar.pax_headers):
                yield _broken(name, "bad_tar", f"the headers at byte {at} say what cannot be so")
                return
            at = tar.offset
            yield info
    if problem := _end(file, tar.offset):
        yield Member(name, problem=problem)


def _end(file: BinaryIO, offset: int) -> Problem | None:
    """A tar ends in blocks of zeros. tarfile takes any block that is no header for the end, and so loses what follows."""
    file.seek(offset)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        return Problem("truncated_tar", f"it ends at byte {offset} without an end mark; samples may be missing")
    if any(block):
        return Problem("bad_tar", f"the header at byte {offset} is damaged; what follows cannot be found")
    end = offset + _BLOCK
    while chunk := file.read(1 << 20):
        end += len(chunk)
        if chunk.count(0) != len(chunk):
            return Problem("bad_tar", f"data follow the end mark at byte {offset}; are these tars joined into one?")
    if end - offset > _MOST_PADDING:
        return Problem("bad_tar", f"only zeros from byte {offset} to {end}; samples may not have been written")
    return None


def _add(found: dict[str, _Found], dotted: dict[str, str], info: tarfile.TarInfo, ignored: Counter[str]) -> None:
    """`dotted`: JSON of keys that hold a dot, by what stands before it."""
    if info.isdir():
        return
    name = info.name
    folder, _, base = name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    extension = extension.lower()
    key = _key(f"{folder}/{stem}" if folder else stem)
    if not stem or extension not in _KINDS:
        ignored[_key(f".{extension}") if stem else "hidden"] += 1
        if stem and extension.endswith(".json"):
            dotted.setdefault(key, name)
        return
    sample = found.setdefault(key, _Found())
    kind = _KINDS[extension]
    if problem := _wrong(info, name, kind in sample.spans):
        sample.problem = sample.problem or problem
    sample.spans[kind] = Span(info.offset_data, info.size)


def _wrong(info: tarfile.TarInfo, name: str, again: bool) -> Problem | None:
    if name.startswith("/") or ".." in name.split("/"):
        return Problem("unsafe_name", f"the member {_key(name)} leads out of the folder it would be unpacked to")
    if shown(name) != name:
        return Problem(
            "bad_name", f"the member {_key(name)} has a name of characters that do not print, or not of UTF-8"
        )
    if len(name) > _MOST_NAME:
        return Problem(
            "bad_name", f"the member {_key(name)} has a name of {len(name)} characters, at most {_MOST_NAME}"
        )
    if not info.isreg() or info.issparse():
        return Problem("not_a_file", f"the member {name} is a link or something else that is no plain file")
    if again:
        return Problem("duplicate_member", f"the member {name} is there twice, or in two formats")
    return None


def _member(key: str, found: _Found) -> Member:
    problem, spans = found.problem, found.spans
    if problem is None and "json" not in spans:
        problem = Problem("missing_json", f"expected {key}.json beside the image, found none")
    return Member(key, spans.get("json"), spans.get("image"), spans.get("rejected"), problem)


def _dotted(key: str, first: str) -> Member:
    detail = f"the member {_key(first)} is no sample: a key ends at the first dot, and there is no {key}.json"
    return Member(key, problem=Problem("bad_name", detail))


def _broken(name: str, reason: str, detail: str) -> Member:
    return Member(name, problem=Problem(reason, detail))


def _key(name: str) -> str:
    """`name` as it can be printed; one of absurd length by its beginning and a digest."""
    if len(name) <= _MOST_NAME:
        return shown(name)
    return f"{shown(name[:100])}...{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}"


def shown(text: str) -> str:
    """Printable on one line, and UTF-8; other text keeps its characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _line(error: Exception) -> str:
    return shown(f"{type(error).__name__}: {' '.join(str(error).split())}")
