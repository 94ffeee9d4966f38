"""What a kind of damage is, and the sound samples that lie around it."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

Files = dict[str, bytes]
Fate = Literal["sound", "bad", "long", "unseen", "stops", "refused", "unindexed"]

END = bytes(2 * tarfile.BLOCKSIZE)
RECORD = {"question": "what is it", "chosen": "a red circle", "rejected": "a blue square"}
SOUND = ("s0", "s1", "s2", "s3", "s4", "s5")
"""`x.tar` holds s0 and s1, the damage, s2 and the text-only s3; `y.tar` holds s4 and s5, a pair of images."""


@dataclass(frozen=True)
class Kind:
    """One kind of damage. `write` makes the folder. `fate` is what must become of it:

    - `sound`: odd, and trained on. `key` is among the samples and shows `shown`; without a key, the rest is all there is.
    - `bad`: the samples or tars in `bad` are named, each with one of its reasons: the run stops, or goes on without them.
    - `long`: `key` does not fit, which is told by name and is no error.
    - `unseen`: no decoder need notice. Trained on, or named with one of the reasons in `bad`.
    - `stops`: the run ends and says `says`, whatever `on_bad_sample` is.
    - `refused`: the folder does not open, and the error says `says`; `mended`: indexing it again helps.
    - `unindexed`: nor can it be indexed.

    `seen`: by any index, only by one that decodes (`pivot data index`), or first in a run. `lost`: sound samples that the
    damage takes with it. `indexed` and `opened` do the damage only then. `ignored`: members that are left alone, by extension.
    """

    write: Callable[[Path], None]
    fate: Fate
    bad: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    key: str | None = None
    seen: Literal["index", "decode", "run"] = "index"
    lost: tuple[str, ...] = ()
    shown: Callable[[], Image.Image] | None = None
    says: str = ""
    mended: bool = False
    indexed: Callable[[Path], None] | None = None
    opened: Callable[[Path], None] | None = None
    ignored: Mapping[str, int] = field(default_factory=dict)


def files(make: Callable[[], Files]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in make().items():
            (folder / name).write_bytes(data)

    return write


def among(odd: Callable[[], bytes], **more: Callable[[], bytes]) -> Callable[[Path], None]:
    """The sound samples with the bytes of `odd` among the members of x.tar; `more` are further tars, by stem."""
    return files(lambda: base(odd()) | {f"{stem}.tar": make() for stem, make in more.items()})


def instead(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """The sound samples, x.tar's bytes changed."""
    return files(lambda: base() | {"x.tar": change(base()["x.tar"])})


def base(odd: bytes = b"") -> Files:
    x = b"".join(sample(n) for n in (0, 1)) + odd + sample(2) + sample(3) + END
    return {"x.tar": x, "y.tar": sample(4) + sample(5) + END}


@cache
def sample(number: int) -> bytes:
    """Members of a sound sample, each with text and picture of its own."""
    key, record = f"s{number}", RECORD | {"question": f"what is it {number}"}
    if number == 3:
        return member(f"{key}.json", record)
    kind = ("PNG", "JPEG", "WEBP", "", "PNG", "PNG")[number]
    name = {"JPEG": "jpg"}.get(kind, kind.lower())
    made = member(f"{key}.json", record) + member(f"{key}.{name}", encoded(look(10 + number), kind))
    return made + (member(f"{key}.rejected.{name}", encoded(look(30), kind)) if number == 5 else b"")


def start(key: str) -> int:
    """Where a sound sample begins in x.tar."""
    return base()["x.tar"].index(f"{key}.json\0".encode())


def member(name: str, data: Any, format: int = tarfile.PAX_FORMAT, **fields: Any) -> bytes:
    """Header, data and padding; `fields` of its TarInfo. What is no bytes becomes JSON."""
    content = data if isinstance(data, bytes) else json.dumps(data).encode()
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field_name, value in fields.items():
        setattr(info, field_name, value)
    return info.tobuf(format, "utf-8", "surrogateescape") + padded(content)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % tarfile.BLOCKSIZE)


def header(name: bytes, size: bytes | int, kind: bytes = b"0") -> bytes:
    """A header whose checksum is right and whose `size` says what it is told; a number is written in base 256."""
    block = bytearray(tarfile.BLOCKSIZE)
    block[: len(name)] = name
    block[100:108] = b"0000644\0"
    block[108:116] = block[116:124] = b"0000000\0"
    if isinstance(size, int):
        size = (size % 256**12).to_bytes(12, "big") if size < 0 else b"\x80" + size.to_bytes(11, "big")
    block[124:136] = size.ljust(12, b"\0")
    block[136:148] = b"00000000000\0"
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def octal(number: int) -> bytes:
    return b"%011o\0" % number


def look(level: int = 90, size: tuple[int, int] = (48, 48)) -> Image.Image:
    """A picture of smooth colours."""
    y, x = np.mgrid[: size[1], : size[0]]
    levels = np.stack([x * 250 // size[0], y * 250 // size[1], np.full_like(x, level)], axis=2)
    return Image.fromarray(levels.astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(
        file, kind, **({"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}) | options
    )
    return file.getvalue()
