"""Images with a caption each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pivot_megatron.data.pair_set import PairSet
from pivot_megatron.data.sample import Conversation
from pivot_megatron.errors import RunError, UserError
from pivot_megatron.probe.tars import images_beside


@dataclass(frozen=True)
class CaptionSet:
    """`names`: of images, for errors. `read`: an image's encoded bytes. `fingerprint`: equal for equal pairs in the same
    order."""

    names: tuple[str, ...]
    captions: tuple[str, ...]
    read: Callable[[int], bytes]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def opened(cls, folder: Path, count: int) -> CaptionSet:
        """The first `count` of tars of `KEY.jpg` with `KEY.txt`, or of this project's shards of conversations, of which the first
        answer is the caption. Raises UserError where there are fewer."""
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give one of tars with images and captions")
        found = _of_shards(folder, count) if (folder / "index.json").is_file() else _of_tars(folder, count)
        if len(found) < count:
            raise UserError(f"{folder}: expected {count} images with a caption, found {len(found)}; lower --count")
        return found


def _of_tars(folder: Path, count: int) -> CaptionSet:
    found = list(islice((image for tar in sorted(folder.glob("*.tar")) for image in images_beside(tar, "txt")), count))
    return _set(
        [one.name for one in found], [one.text for one in found], lambda n: found[n].read(), [one.size for one in found]
    )


def _of_shards(folder: Path, count: int) -> CaptionSet:
    samples = PairSet.open([folder])
    names: list[str] = []
    captions: list[str] = []
    images: list[bytes] = []
    for index in range(len(samples)):
        if len(images) == count:
            break
        try:
            sample = samples.read(index)
        except RunError as error:
            raise UserError(str(error)) from None
        if isinstance(sample, Conversation) and sample.image is not None:
            names.append(f"{folder}: {sample.key}")
            captions.append(sample.turns[1].text)
            images.append(sample.image)
    return _set(names, captions, images.__getitem__, [len(image) for image in images])


def _set(names: list[str], captions: list[str], read: Callable[[int], bytes], sizes: list[int]) -> CaptionSet:
    for name, caption in zip(names, captions, strict=True):
        if not caption.strip():
            raise UserError(f"{name}: expected a caption, found an empty one; leave it out")
    digest = hashlib.sha256(json.dumps([names, captions, sizes]).encode()).hexdigest()
    return CaptionSet(tuple(names), tuple(captions), read, digest)
