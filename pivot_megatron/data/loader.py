"""From shards to micro-batches: reads ahead in a thread, in the one global order, from any step."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from pivot_megatron.data.batch import PackedBatch
from pivot_megatron.data.images import ImageError, ImageTransform
from pivot_megatron.data.order import rank_slice, step_indices
from pivot_megatron.data.packing import pack
from pivot_megatron.data.sample import BadSample, Sample
from pivot_megatron.data.shards import ShardReader
from pivot_megatron.data.tokens import DoesNotFit, SampleTokenizer, Tokenized
from pivot_megatron.errors import RunError, UserError


class PairSet:
    """Samples of several shard folders, one after another, by one index."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._readers = [ShardReader(folder) for folder in folders]
        self._ends: list[int] = []
        for reader in self._readers:
            self._ends.append((self._ends[-1] if self._ends else 0) + len(reader))
        if not len(self):
            raise UserError(f"data.shards: expected samples in {', '.join(map(str, folders))}, found none")

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256("".join(r.fingerprint for r in self._readers).encode()).hexdigest()

    def _locate(self, index: int) -> tuple[ShardReader, int]:
        which = bisect.bisect_right(self._ends, index)
        return self._readers[which], index - (self._ends[which - 1] if which else 0)

    def key(self, index: int) -> str:
        reader, at = self._locate(index)
        return reader.keys[at]

    def read(self, index: int) -> Sample:
        reader, at = self._locate(index)
        return reader.read(at)


@dataclass(frozen=True)
class Dropped:
    key: str
    reason: str
    detail: str


@dataclass(frozen=True)
class StepData:
    """One data-parallel rank's share of a global batch. `keys_digest` is of the whole global batch, in order."""

    step: int
    micro_batches: tuple[PackedBatch, ...]
    dropped: tuple[Dropped, ...]
    keys_digest: str

    @property
    def samples(self) -> int:
        return sum(batch.samples for batch in self.micro_batches)


@dataclass(frozen=True)
class Loader:
    """`with_images`: whether this rank's pipeline stage runs the encoder; elsewhere no image is decoded.

    A sample that does not fit leaves its place in the batch empty, so that neither the order nor any other rank depends on
    it: losses are sums over what is there. Whether it fits is seen from its text, so every pipeline stage decides alike. A
    sample that is broken stops the run with its name.
    """

    samples: PairSet
    tokenize: SampleTokenizer
    transform: ImageTransform
    image_backend: Literal["pil", "torch"]
    global_size: int
    micro_size: int
    seed: int
    pack_multiple: int
    rank: int
    size: int
    with_images: bool

    def steps(self, first: int, last: int) -> Iterator[StepData]:
        """Steps `first` to `last` (exclusive), two ahead of what is asked for."""
        with ThreadPoolExecutor(max_workers=2, thread_name_prefix="loader") as pool:
            ahead: list[Future[StepData]] = []
            for step in range(first, last):
                ahead.append(pool.submit(self.load, step))
                if len(ahead) > 2:
                    yield ahead.pop(0).result()
            for future in ahead:
                yield future.result()

    def load(self, step: int) -> StepData:
        indices = step_indices(step, self.global_size, len(self.samples), self.seed)
        digest = hashlib.sha256("\n".join(map(self.samples.key, indices)).encode()).hexdigest()[:16]
        own = rank_slice(indices, self.rank, self.size)
        dropped: list[Dropped] = []
        batches = [
            self._micro_batch(own[start : start + self.micro_size], dropped)
            for start in range(0, len(own), self.micro_size)
        ]
        return StepData(step, tuple(batches), tuple(dropped), digest)

    def _micro_batch(self, indices: Sequence[int], dropped: list[Dropped]) -> PackedBatch:
        kept: list[Tokenized] = []
        pixels: list[torch.Tensor] = []
        for index in indices:
            try:
                tokenized, image = self._sample(index)
            except DoesNotFit as bad:
                dropped.append(Dropped(bad.key, bad.reason, bad.detail))
                continue
            kept.append(tokenized)
            if image is not None:
                pixels.append(image)
        return pack(kept, pixels, self.tokenize.branches, self.transform.image_size, self.pack_multiple)

    def _sample(self, index: int) -> tuple[Tokenized, torch.Tensor | None]:
        sample = self._read(index)
        try:
            tokenized = self.tokenize(sample)
        except DoesNotFit:
            raise
        except BadSample as bad:
            raise RunError(f"data.shards: {bad}; mend or remove it") from None
        if sample.image is None:
            return tokenized, None
        if not self.with_images:
            return tokenized, torch.zeros(3, 0, 0)
        try:
            return tokenized, self.transform(sample.image, self.image_backend)
        except ImageError as error:
            raise RunError(f"data.shards: sample {sample.key}: bad_image: {error}; mend or remove it") from None

    def _read(self, index: int) -> Sample:
        try:
            return self.samples.read(index)
        except BadSample as bad:
            raise RunError(f"data.shards: {bad}; mend or remove it") from None
