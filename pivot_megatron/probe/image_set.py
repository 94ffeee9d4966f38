"""Labelled images for probes: a folder of folders, ImageNet in WebDataset tars, or what is in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pivot_megatron.errors import UserError
from pivot_megatron.probe.tars import EXTENSIONS, images_beside

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ImageSet:
    """`names`: of images, for errors. `labels` `[images]` index `classes`. `read`: an image's encoded bytes. `fingerprint`: equal
    for equal images in the same order."""

    names: tuple[str, ...]
    labels: Labels
    classes: tuple[str, ...]
    read: Callable[[int], bytes]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def of_bytes(cls, images: Sequence[bytes], labels: Labels, classes: Sequence[str]) -> ImageSet:
        digest = hashlib.sha256(b"".join(hashlib.sha256(image).digest() for image in images)).hexdigest()
        return cls(
            tuple(f"image {n}" for n in range(len(images))), labels, tuple(classes), list(images).__getitem__, digest
        )

    @classmethod
    def opened(cls, folder: Path) -> ImageSet:
        """`folder/CLASS/**/IMAGE`, as torchvision's ImageFolder has it, or tars of `KEY.jpg` with `KEY.cls`. Raises UserError
        where it is neither."""
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give one of images a class, or of WebDataset tars")
        tars = sorted(folder.glob("*.tar"))
        return _of_tars(folder, tars) if tars else _of_folders(folder)


def _of_folders(folder: Path) -> ImageSet:
    found = [
        (path, one.name)
        for one in sorted(folder.iterdir())
        if one.is_dir()
        for path in sorted(one.rglob("*"))
        if path.suffix.lower() in EXTENSIONS
    ]
    if not found:
        raise UserError(
            f"{folder}: expected folders of images, one a class, or WebDataset tars, found no image and no tar"
        )
    paths = [path for path, _ in found]
    sizes = [f"{path.relative_to(folder)} {path.stat().st_size}" for path in paths]
    return _labelled([str(path) for path in paths], [one for _, one in found], lambda n: paths[n].read_bytes(), sizes)


def _of_tars(folder: Path, tars: Sequence[Path]) -> ImageSet:
    found = [image for tar in tars for image in images_beside(tar, "cls")]
    if not found:
        raise UserError(f"{folder}: expected samples KEY.jpg with KEY.cls in its tars, found none")
    told = [f"{image.name} {image.size}" for image in found]
    return _labelled([image.name for image in found], [image.text for image in found], lambda n: found[n].read(), told)


def _labelled(names: Sequence[str], of: Sequence[str], read: Callable[[int], bytes], told: Sequence[str]) -> ImageSet:
    """`of`: each image's class. Classes that are numbers are in their order."""
    classes = sorted(set(of), key=lambda one: (0, int(one), one) if one.isdecimal() else (1, 0, one))
    index = {one: n for n, one in enumerate(classes)}
    digest = hashlib.sha256(json.dumps([list(told), list(of)]).encode()).hexdigest()
    return ImageSet(tuple(names), np.array([index[one] for one in of], np.int64), tuple(classes), read, digest)
