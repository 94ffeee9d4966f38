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
from pivot_megatron.probe.stored import EXTENSIONS, StoredImage, image_file, images_beside, tars_at

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
    def opened(cls, where: Path, cache: Path | None = None) -> ImageSet:
        """`where/CLASS/**/IMAGE`, as torchvision's ImageFolder has it, or tars of `KEY.jpg` with `KEY.cls`: those of a folder, or
        of a pattern. `cache`: a folder that keeps what tars hold. Raises UserError where it is neither."""
        return _of_tars(where, tars, cache) if (tars := tars_at(where)) else _of_folders(where)


def _of_folders(folder: Path) -> ImageSet:
    found = [
        image_file(path, one.name)
        for one in sorted(folder.iterdir())
        if one.is_dir()
        for path in sorted(one.rglob("*"))
        if path.suffix.lower() in EXTENSIONS
    ]
    if not found:
        raise UserError(
            f"{folder}: expected folders of images, one a class, or WebDataset tars, found no image and no tar"
        )
    return _labelled(found)


def _of_tars(where: Path, tars: Sequence[Path], cache: Path | None) -> ImageSet:
    found = [image for tar in tars for image in images_beside(tar, "cls", cache)]
    if not found:
        raise UserError(f"{where}: expected samples KEY.jpg with KEY.cls in its tars, found none")
    return _labelled(found)


def _labelled(images: Sequence[StoredImage]) -> ImageSet:
    """An image's text is its class. Classes that are numbers are in their order."""
    classes = sorted(
        {image.text for image in images}, key=lambda one: (0, int(one), one) if one.isdecimal() else (1, 0, one)
    )
    index = {one: n for n, one in enumerate(classes)}
    digest = hashlib.sha256(json.dumps([image.facts for image in images]).encode()).hexdigest()
    labels = np.array([index[image.text] for image in images], np.int64)
    return ImageSet(tuple(image.name for image in images), labels, tuple(classes), lambda n: images[n].read(), digest)
