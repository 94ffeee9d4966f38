"""Reading samples of a folder of shards at random, by its index."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pivot_megatron.config.schema import ShardCache
from pivot_megatron.data.images import ImageError, image_size_of
from pivot_megatron.data.index import Shard, read_index
from pivot_megatron.data.members import Span
from pivot_megatron.data.remote import storage_of
from pivot_megatron.data.sample import BadSample, Sample, parse_sample
from pivot_megatron.data.spans import joined
from pivot_megatron.data.storage import Storage


class ShardReader:
    """Random access to the samples of a folder of shards, in the order of the index.

    A reader may be pickled, forked, and read from threads. Raises UserError where the folder and its index do not agree.
    """

    def __init__(self, folder: Storage) -> None:
        self._folder = folder
        self._index = read_index(folder)

    def __len__(self) -> int:
        return len(self._index.keys)

    @property
    def where(self) -> str:
        return self._folder.where

    @property
    def beside(self) -> Path:
        """Where files that are made from the samples are kept."""
        return self._folder.beside

    @property
    def shards(self) -> Sequence[Shard]:
        return self._index.shards

    @property
    def keys(self) -> Sequence[str]:
        """The samples' keys, in order."""
        return self._index.keys

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the tars' checksums in order: names the data, whatever folder and tars are called."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()

    @property
    def known_bad(self) -> list[BadSample]:
        """The samples that the index says are broken."""
        return [self._problem(position) for position in sorted(self._index.problems)]

    def _problem(self, position: int) -> BadSample:
        problem = self._index.problems[position]
        return BadSample(self.keys[position], problem.reason, problem.detail)

    def read(self, position: int, images: bool = True) -> Sample:
        """The sample at `position`, 0 ≤ position < len; without `images` those it has are empty bytes.

        Raises IndexError, BadSample, and RunError for a lost tar.
        """
        self._require_sound(position)
        tar, spans = self._tar(position), self._spans(position)
        read = [(run, self._folder.read_range(tar, run.offset, run.size)) for run in self._runs(position, images)]
        text, image, rejected = (
            None if span is None else _cut(read, span) if images or number == 0 else b""
            for number, span in enumerate(spans)
        )
        if images:
            self._require_sizes(position, [one for one in (image, rejected) if one is not None])
        return parse_sample(self.keys[position], text or b"", image, rejected)

    def warm(self, positions: Iterable[int]) -> None:
        """Get samples ready that will be read soon, for remote folders with a cache. Raises RunError."""
        self._folder.warm(self._ranges(positions))

    def _ranges(self, positions: Iterable[int]) -> Iterator[tuple[str, int, int]]:
        for position in positions:
            if position not in self._index.problems:
                for run in self._runs(position, images=False):
                    yield self._tar(position), run.offset, run.size

    def _runs(self, position: int, images: bool) -> list[Span]:
        """What is asked for to read a sample: one span where its members lie side by side."""
        spans = self._spans(position)
        whole = joined(span for span in spans if span)
        if images or sum(run.size for run in whole) <= self._folder.whole_up_to:
            return whole
        return joined(span for span in spans[:1] if span)

    def _tar(self, position: int) -> str:
        shard: Shard = self._index.shards[self._index.numbers[position]]
        return shard.name

    def _spans(self, position: int) -> list[Span | None]:
        """Of the json, the image and the rejected image."""
        return [Span(offset, size) if offset >= 0 else None for offset, size in self._index.spans[position].tolist()]

    def _require_sizes(self, position: int, images: Sequence[bytes]) -> None:
        """The index's: they say what room an image takes in the sequence, so other ones would shift all that follows."""
        for image, size in zip(images, self.image_sizes(position), strict=True):
            try:
                found = image_size_of(io.BytesIO(image))
            except ImageError as error:
                raise BadSample(self.keys[position], "bad_image", error.detail) from None
            if found != size:
                detail = "{}x{} pixels, in the index {}x{}: the tar was changed".format(*found, *size)
                raise BadSample(self.keys[position], "bad_image", detail)

    def image_sizes(self, position: int) -> list[tuple[int, int]]:
        """Width and height in pixels of a sample's images, the rejected one last. Raises IndexError and BadSample."""
        self._require_sound(position)
        return [(width, height) for width, height in self._index.sizes[position].tolist() if width]

    def image_names(self, position: int) -> list[int]:
        """Of a sample's images, what those of the same bytes have in common, 0 where the index does not know. Raises IndexError
        and BadSample."""
        self._require_sound(position)
        sizes, names = self._index.sizes[position].tolist(), self._index.names[position].tolist()
        return [name for (width, _), name in zip(sizes, names, strict=True) if width]

    def _require_sound(self, position: int) -> None:
        if not 0 <= position < len(self):
            raise IndexError(f"sample {position} of {len(self)}")
        if position in self._index.problems:
            raise self._problem(position)


def _cut(read: Iterable[tuple[Span, bytes]], span: Span) -> bytes:
    """`span` of what was read: of the one run that holds it."""
    return next(data[span.offset - run.offset :][: span.size] for run, data in read if run.holds(span))


def open_shards(where: str | Path, cache: ShardCache | None = None) -> ShardReader:
    """The shards of a local folder, or of one that fsspec reaches (`s3://bucket/folder`), through `cache`. Raises UserError."""
    return ShardReader(storage_of(str(where), cache))
