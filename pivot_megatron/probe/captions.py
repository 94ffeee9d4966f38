"""Images with a caption each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pivot_megatron.data.pair_set import PairSet
from pivot_megatron.data.sample import Conversation
from pivot_megatron.errors import RunError, UserError
from pivot_megatron.probe.stored import images_beside, tars_at


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
    def opened(cls, where: Path, count: int) -> CaptionSet:
        """The first `count` of tars of `KEY.jpg` with `KEY.txt`, of a folder or of a pattern, or of this project's shards of
        conversations, of which the first answer is the caption. Raises UserError where there are fewer."""
        found = _of_shards(where, count) if (where / "index.json").is_file() else _of_tars(where, count)
        if len(found) < count:
            raise UserError(f"{where}: expected {count} images with a caption, found {len(found)}; lower --count")
        return found


def _of_tars(where: Path, count: int) -> CaptionSet:
    found = list(islice((image for tar in tars_at(where) for image in images_beside(tar, "txt")), count))
    facts = [image.facts for image in found]
    return _set([one.name for one in found], [one.text for one in found], lambda n: found[n].read(), facts)


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
    digests = [hashlib.sha256(image).hexdigest() for image in images]
    return _set(names, captions, images.__getitem__, digests)


def _set(names: list[str], captions: list[str], read: Callable[[int], bytes], facts: Sequence[object]) -> CaptionSet:
    """`facts`: equal for equal images."""
    for name, caption in zip(names, captions, strict=True):
        if not caption.strip():
            raise UserError(f"{name}: expected a caption, found an empty one; leave it out")
    digest = hashlib.sha256(json.dumps([names, captions, list(facts)]).encode()).hexdigest()
    return CaptionSet(tuple(names), tuple(captions), read, digest)
