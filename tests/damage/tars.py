"""Damage of a tar: its headers, its end, its members' names and kinds."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.damage.kinds import (
    END,
    RECORD,
    Files,
    Kind,
    among,
    base,
    encoded,
    files,
    header,
    instead,
    look,
    member,
    octal,
    padded,
    start,
)

BLOCK = tarfile.BLOCKSIZE
X = ("s0", "s1", "s2", "s3")
AFTER = ("s2", "s3")


def broken(
    change: Callable[[bytes], bytes], /, *reasons: str, lost: tuple[str, ...] = (), **bad: tuple[str, ...]
) -> Kind:
    """x.tar changed, and named for it."""
    return Kind(instead(change), "bad", {"x.tar": reasons, **bad}, lost=lost)


def breaking(make: Callable[[], bytes], /, *reasons: str, **bad: tuple[str, ...]) -> Kind:
    """Members after which nothing can be found."""
    return Kind(among(make), "bad", {"x.tar": reasons, **bad}, lost=AFTER)


def bad(odd: Callable[[], bytes], problems: Mapping[str, str], key: str | None = None, **more: Any) -> Kind:
    told = {name: tuple(reason.split()) for name, reason in problems.items()}
    return Kind(among(odd, **more), "bad", told, key=key)


def sound(odd: Callable[[], bytes], key: str | None = "odd", **more: Any) -> Kind:
    return Kind(among(odd), "sound", key=key, shown=look if key else None, **more)


def alone(make: Callable[[], bytes], ignored: str, count: int = 1) -> Kind:
    return Kind(among(make), "sound", ignored={ignored: count})


def over(at: int, data: bytes) -> Callable[[bytes], bytes]:
    """Written over x.tar from `at` bytes past where s2 begins."""
    return lambda x: x[: start("s2") + at] + data + x[start("s2") + at + len(data) :]


def text(name: str = "odd.json", **fields: Any) -> bytes:
    return member(name, RECORD, **fields)


def picture(name: str = "odd.png", **fields: Any) -> bytes:
    return member(name, encoded(look(), "PNG"), **fields)


def odd(name: str = "odd", **fields: Any) -> bytes:
    """A sound sample of another name or in other headers."""
    return text(f"{name}.json", **fields) + picture(f"{name}.png", **fields)


def special(kind: bytes, name: str = "odd.json", link: str = "") -> bytes:
    return member(name, b"", type=kind, linkname=link)


def sized(size: bytes | int, name: bytes = b"odd.json", kind: bytes = b"0", data: bytes = b"{}") -> bytes:
    return header(name, size, kind) + padded(data)


def extended(data: bytes, kind: bytes = b"x") -> bytes:
    """A header of PAX records, or of a long name, before what comes next."""
    return sized(octal(len(data)), b"more", kind, data)


def record(name: str, value: str) -> bytes:
    """A PAX record: its own length, and what it says."""
    said = f" {name}={value}\n".encode()
    length = next(n for n in range(len(said), len(said) + 9) if n == len(str(n)) + len(said))
    return str(length).encode() + said


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("odd.json", "{}")
    return file.getvalue()


def sparse_1_0() -> bytes:
    said = [("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.name", "odd.json")]
    map_ = b"1\n0\n5\n".ljust(BLOCK, b"\0")
    more = extended(b"".join(record(*one) for one in [*said, ("GNU.sparse.realsize", "5")]))
    return more + sized(octal(BLOCK + 5), b"odd.json", data=map_ + b"hello")


def two(first: Callable[[], bytes], second: Callable[[], bytes]) -> Callable[[Path], None]:
    return files(lambda: {**base(first()), "z.tar": second() + END})


def tar_named(name: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        files(base)(folder)
        (folder / name.decode("utf-8", "surrogateescape")).write_bytes(odd() + b"\xff" * BLOCK)

    return write


def extra(**tars: Callable[[], bytes]) -> Callable[[Path], None]:
    def make() -> Files:
        return base() | {f"{stem}.tar": data() for stem, data in tars.items()}

    return files(make)


ENDS = {
    "cut-in-a-header": broken(lambda x: x[: start("s2") + 100], "truncated_tar", "bad_tar", lost=AFTER),
    "cut-in-data": broken(lambda x: x[: start("s2") + BLOCK + 20], "truncated_tar", lost=AFTER),
    "cut-between-members": broken(lambda x: x[: start("s2")], "truncated_tar", lost=AFTER),
    "cut-before-its-end-mark": broken(lambda x: x[: -len(END)], "truncated_tar"),
    "cut-in-padding": broken(lambda x: x[: -len(END) - 100], "truncated_tar"),
    "cut-within-the-end-mark": broken(lambda x: x[: -len(END) + 100], "truncated_tar"),
    "tail-of-zeros": broken(lambda x: x[: start("s2")] + bytes(1 << 20), "bad_tar", lost=AFTER),
    "hole-of-zeros": broken(over(0, bytes(BLOCK)), "bad_tar", lost=AFTER),
    "two-joined": broken(lambda x: x + odd("more") + END, "bad_tar"),
    "text-after-its-end": broken(lambda x: x + b"and that was all", "bad_tar"),
    "half-an-end-mark": Kind(instead(lambda x: x[:-BLOCK]), "sound"),
    "padded-to-records": Kind(instead(lambda x: x + bytes(-len(x) % tarfile.RECORDSIZE)), "sound"),
}

WHOLE = {
    "empty-file": broken(lambda x: b"", "bad_tar", lost=X),
    "garbage": broken(lambda x: bytes(range(256)) * 40, "bad_tar", lost=X),
    "html": broken(lambda x: b"<html><body>404 Not Found</body></html>" * 100, "bad_tar", lost=X),
    "text-of-one-block": broken(lambda x: b"version https://git-lfs\noid sha256:0\n".ljust(BLOCK), "bad_tar", lost=X),
    "gzip": broken(gzip.compress, "bad_tar", lost=X),
    "bzip2": broken(bz2.compress, "bad_tar", lost=X),
    "xz": broken(lzma.compress, "bad_tar", lost=X),
    "zstd": broken(lambda x: b"\x28\xb5\x2f\xfd" + x[:3000], "bad_tar", lost=X),
    "zip": broken(lambda x: zipped(), "bad_tar", lost=X),
    "starts-late": broken(lambda x: b"\0" + x, "bad_tar", "no_samples", lost=X),
    "zeros": broken(lambda x: bytes(len(x)), "no_samples", lost=X),
    "megabytes-of-zeros": broken(lambda x: bytes(3 << 20), "bad_tar", "no_samples", lost=X),
    "of-text-files": Kind(extra(z=lambda: member("a.txt", b"a") + END), "bad", {"z.tar": ("no_samples",)}),
    "of-folders": Kind(extra(z=lambda: special(tarfile.DIRTYPE, "a/") + END), "bad", {"z.tar": ("no_samples",)}),
    "name-not-utf-8": Kind(
        tar_named(b"z\xff.tar"), "bad", {"z\\udcff.tar": ("bad_tar", "truncated_tar")}, key="odd", shown=look
    ),
    "name-of-two-lines": Kind(
        tar_named(b"z\n.tar"), "bad", {"z\\n.tar": ("bad_tar", "truncated_tar")}, key="odd", shown=look
    ),
}

HEADERS = {
    "wrong-checksum": broken(over(150, b"9"), "bad_tar", lost=AFTER),
    "flipped-bit": broken(over(1, b"3"), "bad_tar", lost=AFTER),
    "is-garbage": broken(over(0, b"\xa5" * BLOCK), "bad_tar", lost=AFTER),
    "size-not-a-number": breaking(lambda: sized(b"sixteen"), "bad_tar"),
    "size-empty": bad(lambda: header(b"odd.json", b"") + picture(), {"odd": "bad_json"}),
    "size-past-the-end": breaking(lambda: sized(octal(1 << 30)), "truncated_tar"),
    "size-of-8-gib": breaking(lambda: sized(octal(8**11 - 1)), "truncated_tar"),
    "size-in-base-256-past-the-end": breaking(lambda: sized(1 << 60), "truncated_tar"),
    "size-negative": breaking(lambda: sized(-BLOCK), "truncated_tar", "bad_tar"),
    "size-negative-back-to-itself": breaking(lambda: sized(-2 * BLOCK), "truncated_tar", "bad_tar"),
    "size-of-a-block-less": breaking(
        lambda: sized(octal(2), data=bytes(BLOCK) + b"x" * 20), "bad_tar", odd=("bad_json",)
    ),
    "size-over-the-next": bad(
        lambda: sized(octal(BLOCK + 2)) + member("odd.txt", b"") + picture(), {"odd": "bad_json"}
    ),
    "size-some-bytes-short": bad(lambda: sized(octal(5), data=b'{"a": 5}') + picture(), {"odd": "bad_json"}),
    "sparse-negative": breaking(lambda: sized(-BLOCK, kind=b"S"), "bad_tar"),
    "folder-negative": breaking(lambda: sized(-BLOCK, b"d/", b"5"), "bad_tar"),
    "folder-with-a-size": sound(lambda: header(b"d/", octal(1 << 20), b"5") + odd()),
    "link-with-a-size": sound(lambda: header(b"notes", octal(1 << 20), b"2") + odd(), ignored={".": 1}),
    "pax-size-past-the-end": breaking(
        lambda: extended(record("size", str(1 << 40))) + sized(octal(2)), "truncated_tar"
    ),
    "pax-size-negative": breaking(
        lambda: extended(record("size", "-512")) + sized(octal(2)), "truncated_tar", "bad_tar"
    ),
    "pax-size-of-the-one-before": breaking(
        lambda: extended(record("size", str(-3 * BLOCK))) + sized(octal(2)), "truncated_tar", "bad_tar"
    ),
    "pax-size-not-a-number": breaking(
        lambda: extended(record("size", "two")) + sized(octal(2)), "bad_tar", odd=("bad_json",)
    ),
    "pax-length-lies": breaking(lambda: extended(b"999 path=odd.json\n") + sized(octal(2)), "bad_tar"),
    "pax-garbage": breaking(lambda: extended(bytes(range(256)) * 4) + sized(octal(2)), "bad_tar"),
    "pax-of-a-million-digits": breaking(lambda: extended(b"1" * (1 << 20)) + odd(), "bad_tar"),
    "pax-of-8-gib": breaking(lambda: sized(octal(8**11 - 1), b"more", b"x"), "bad_tar"),
    "pax-negative": breaking(lambda: sized(-BLOCK, b"more", b"x"), "bad_tar"),
    "pax-and-nothing-after": breaking(lambda: extended(record("path", "odd.json")) + END, "bad_tar"),
    "pax-renames-the-rest": breaking(lambda: extended(record("path", "same.txt"), b"g") + odd(), "bad_tar"),
    "long-name-of-an-exabyte": breaking(lambda: sized(1 << 60, b"more", b"L"), "bad_tar"),
    "long-names-in-a-chain": breaking(lambda: extended(b"odd.json\0", b"L") * 3000 + sized(octal(2)), "bad_tar"),
    "comment-for-all": sound(lambda: extended(record("comment", "a" * 3000), b"g") + odd()),
    "attributes": sound(lambda: extended(record("SCHILY.xattr.user.a", "b" * 3000)) + text() + picture()),
    "scattered-members": sound(lambda: picture() + member("odd.txt", b"a") + text(), ignored={".txt": 1}),
    "gnu-format": sound(lambda: odd("o" * 120, format=tarfile.GNU_FORMAT), key="o" * 120),
    "long-pax-name": sound(lambda: odd("o" * 300), key="o" * 300),
    "ustar-with-a-prefix": sound(
        lambda: odd(f"{'a' * 90}/{'b' * 80}", format=tarfile.USTAR_FORMAT), key=f"{'a' * 90}/{'b' * 80}"
    ),
    "contiguous-files": sound(lambda: odd(type=tarfile.CONTTYPE)),
    "old-v7-files": sound(lambda: odd(type=tarfile.AREGTYPE)),
    "year-1969-of-user-minus-one": sound(lambda: odd(mtime=-1, uid=1 << 40, format=tarfile.GNU_FORMAT)),
}

_DIGESTED = f"{'o' * 100}...{hashlib.sha256(b'o' * 60_000).hexdigest()[:16]}"

NAMES = {
    "absolute": bad(lambda: odd("/odd", format=tarfile.GNU_FORMAT), {"odd": "unsafe_name"}),
    "climbing": bad(lambda: odd("../odd"), {"../odd": "unsafe_name"}),
    "climbing-later": bad(lambda: odd("a/../../odd"), {"a/../../odd": "unsafe_name"}),
    "not-utf-8": bad(lambda: odd("od\udcff", format=tarfile.GNU_FORMAT), {"od\\udcff": "bad_name"}),
    "of-two-lines": bad(lambda: odd("od\nd"), {"od\\nd": "bad_name"}),
    "with-escapes": bad(lambda: odd("\x1b[31modd"), {"\\x1b[31modd": "bad_name"}),
    "right-to-left": bad(lambda: odd("od\u202ed"), {"od\\u202ed": "bad_name"}),
    "of-100-kb": bad(lambda: odd("o" * 60_000), {_DIGESTED: "bad_name"}),
    "dotted": bad(lambda: odd("img.0001") + odd("img.0002"), {"img": "bad_name"}),
    "any-script": sound(lambda: odd("größe/大きさ"), key="größe/大きさ"),
    "dotted-folder": sound(lambda: odd("./v1.0/odd"), key="v1.0/odd"),
    "capital-extension": sound(lambda: text("odd.JSON") + picture("odd.PNG")),
    "with-spaces": sound(lambda: odd(" od d "), key=" od d "),
    "backslash": sound(lambda: odd("a\\odd"), key="a\\odd"),
    "without-a-stem": alone(lambda: text(".json") + picture("a/.png"), "hidden", 2),
    "resource-forks": alone(lambda: text("._odd.json") + picture("__MACOSX/._odd.png"), "hidden", 2),
    "without-extension": alone(lambda: member("odd", b"{}"), "."),
    "text-alone": alone(lambda: member("odd.txt", b"a"), ".txt"),
    "tar-in-a-tar": alone(lambda: member("odd.tar", odd() + END), ".tar"),
    "other-parts": Kind(
        among(lambda: odd() + member("odd.seg.png", b"") + member("odd.meta.json", {})),
        "sound",
        key="odd",
        shown=look,
        ignored={".meta.json": 1, ".seg.png": 1},
    ),
}

MEMBERS = {
    "sparse": bad(lambda: sized(octal(5), kind=b"S", data=b"hello") + picture(), {"odd": "not_a_file"}),
    "sparse-1-0": bad(lambda: sparse_1_0() + picture(), {"odd": "not_a_file"}),
    "symbolic-link": bad(lambda: text() + special(tarfile.SYMTYPE, "odd.png", "/etc/passwd"), {"odd": "not_a_file"}),
    "hard-link": bad(lambda: special(tarfile.LNKTYPE, link="s0.json") + picture(), {"odd": "not_a_file"}),
    "character-device": bad(lambda: special(tarfile.CHRTYPE) + picture(), {"odd": "not_a_file"}),
    "block-device": bad(lambda: special(tarfile.BLKTYPE) + picture(), {"odd": "not_a_file"}),
    "fifo": bad(lambda: special(tarfile.FIFOTYPE) + picture(), {"odd": "not_a_file"}),
    "unknown-type": bad(lambda: special(b"Z") + picture(), {"odd": "not_a_file"}),
    "folder-named-like-a-sample": bad(
        lambda: special(tarfile.DIRTYPE, "odd.json") + picture(), {"odd": "missing_json"}
    ),
    "json-twice": bad(lambda: text() + odd(), {"odd": "duplicate_member"}),
    "json-twice-by-another-path": bad(lambda: odd() + text("./odd.json"), {"odd": "duplicate_member"}),
    "json-twice-in-capitals": bad(lambda: odd() + text("odd.JSON"), {"odd": "duplicate_member"}),
    "image-in-two-formats": bad(lambda: odd() + picture("odd.jpg"), {"odd": "duplicate_member"}),
    "sample-twice": bad(lambda: odd() + odd(), {"odd": "duplicate_member"}),
    "image-alone": bad(picture, {"odd": "missing_json"}),
    "rejected-alone": bad(lambda: text() + picture("odd.rejected.png"), {"odd": "missing_image"}),
    "key-in-two-tars": Kind(two(odd, odd), "bad", {"odd@z.tar": ("duplicate_key",)}, key="odd", shown=look),
    "key-in-two-tars-once-broken": Kind(
        two(lambda: member("odd.json", b"{") + picture(), odd),
        "bad",
        {"odd": ("bad_json",), "odd@z.tar": ("duplicate_key",)},
    ),
    "key-of-a-sound-one": bad(lambda: odd("s0"), {"s0": "duplicate_member"}),
    "split-over-two-tars": Kind(two(text, picture), "bad", {"odd@z.tar": ("duplicate_key", "missing_json")}, key="odd"),
}
