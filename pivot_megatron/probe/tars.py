"""Images in WebDataset tars, each with a text beside it: ImageNet's classes, captions."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pivot_megatron.errors import UserError

EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"))


@dataclass(frozen=True)
class TarImage:
    """An image's place in a tar, its name for errors, and the text beside it, stripped."""

    name: str
    text: str
    tar: Path
    offset: int
    size: int

    def read(self) -> bytes:
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def images_beside(tar: Path, extension: str) -> Iterator[TarImage]:
    """Each KEY.jpg (or another image) with its KEY.`extension`, in order. Raises UserError for an image without, and for a
    tar that cannot be read."""
    images: dict[str, tuple[int, int]] = {}
    texts: dict[str, str] = {}
    try:
        with tarfile.open(tar, "r:") as file:
            for member in file:
                folder, slash, base = member.name.rpartition("/")
                key, _, kind = base.partition(".")
                key = folder + slash + key
                if f".{kind.lower()}" in EXTENSIONS:
                    images[key] = (member.offset_data, member.size)
                elif kind == extension and (content := file.extractfile(member)):
                    texts[key] = content.read().decode().strip()
    except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{tar}: not a tar that can be read ({error}); fetch it again") from None
    for key, (offset, size) in images.items():
        if key not in texts:
            raise UserError(f"{tar}: {key}: expected {key}.{extension} beside the image, found none")
        yield TarImage(f"{tar}: {key}", texts[key], tar, offset, size)
