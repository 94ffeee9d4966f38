"""From shards to micro-batches: reads ahead in a thread, in the one global order, from any step."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import torch

from pivot_megatron.data.batch import PackedBatch
from pivot_megatron.data.images import Backend, ImageError
from pivot_megatron.data.order import step_indices
from pivot_megatron.data.packing import pack
from pivot_megatron.data.plan import Size, plan_micro_batches
from pivot_megatron.data.reference import ReferenceFile
from pivot_megatron.data.sample import BadSample, Pair, Sample
from pivot_megatron.data.shards import ShardReader
from pivot_megatron.data.tokens import DoesNotFit, SampleTokenizer, Tokenized
from pivot_megatron.data.views import ImageViews, View
from pivot_megatron.errors import RunError, UserError

T = TypeVar("T")


class PairSet:
    """Samples of several shard folders, one after another, by one index."""

    def __init__(self, readers: Sequence[ShardReader]) -> None:
        self._readers = readers
        self._ends = list(accumulate(map(len, readers)))

    @classmethod
    def open(cls, folders: Sequence[Path]) -> PairSet:
        readers = [ShardReader(folder) for folder in folders]
        if empty := [str(folder) for folder, reader in zip(folders, readers, strict=True) if not len(reader)]:
            raise UserError(f"data.shards: expected samples in {', '.join(empty)}, found none")
        return cls(readers)

    def by_folder(self) -> list[PairSet]:
        """The samples of each folder as a set of their own."""
        return [PairSet([reader]) for reader in self._readers]

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256("".join(r.fingerprint for r in self._readers).encode()).hexdigest()

    def _locate(self, index: int) -> tuple[ShardReader, int]:
        which, at = self.place(index)
        return self._readers[which], at

    @property
    def keys(self) -> list[str]:
        return [key for reader in self._readers for key in reader.keys]

    def key(self, index: int) -> str:
        reader, at = self._locate(index)
        return reader.keys[at]

    def place(self, index: int) -> tuple[int, int]:
        """The folder's number and the sample's position in it."""
        which = bisect.bisect_right(self._ends, index)
        return which, index - (self._ends[which - 1] if which else 0)

    def read(self, index: int, images: bool = True) -> Sample:
        reader, at = self._locate(index)
        return reader.read(at, images)

    def image_sizes(self, index: int) -> list[tuple[int, int]]:
        """Width and height of a sample's images. Raises ImageError."""
        reader, at = self._locate(index)
        return reader.image_sizes(at)


@dataclass(frozen=True)
class Dropped:
    """A sample that is left out: one that does not fit, or a `bad` one. `index`: its place in the set."""

    index: int
    key: str
    reason: str
    detail: str
    bad: bool

    @classmethod
    def of(cls, index: int, error: BadSample) -> Dropped:
        return cls(index, error.key, error.reason, error.detail, not isinstance(error, DoesNotFit))


Chosen = tuple[int, Tokenized]
"""A sample by its place in the set, and its tokens."""


@dataclass(frozen=True)
class StepData:
    """One data-parallel rank's share of a global batch. `keys_digest` is of the whole global batch, in order.

    `chosen`: the samples of each micro-batch. `dropped`: what every rank left out, told by the first; `bad`: what this one
    alone did, for it decodes its images.
    """

    step: int
    micro_batches: tuple[PackedBatch, ...]
    dropped: tuple[Dropped, ...]
    keys_digest: str
    fitting: int  # samples of the global batch whose text fits
    chosen: tuple[tuple[Chosen, ...], ...]
    bad: tuple[Dropped, ...]

    @property
    def samples(self) -> int:
        return sum(batch.samples for batch in self.micro_batches)


@dataclass(frozen=True)
class Loader:
    """`with_images`: whether this rank's pipeline stage runs the encoder; elsewhere no image is read. `flops`: the estimated
    work of a sample, by which micro-batches are balanced. `reference`: the files of the folders of `samples`, where batches
    bring their reference log-probs.

    A sample that does not fit leaves its place in the batch empty, so that neither the order nor any other rank depends on
    it: losses are sums over what is there. Whether it fits is seen from its text, so every rank decides alike. A sample that
    is broken stops the run with its name, or leaves its place empty too where `skip_bad`: one whose image is broken on the
    ranks that decode it, which others follow by `without`.
    """

    samples: PairSet
    tokenize: SampleTokenizer
    images: ImageViews
    image_backend: Backend
    flops: Callable[[Tokenized], float]
    global_size: int
    micro_tokens: int
    micro_images: int | None
    seed: int
    pack_multiple: int
    rank: int
    size: int
    with_images: bool
    reference: Sequence[ReferenceFile] = ()
    skip_bad: bool = False

    def steps(self, first: int, last: int) -> Iterator[StepData]:
        """Steps `first` to `last` (exclusive), two ahead of what is asked for."""
        return _ahead(self.load, range(first, last))

    def load(self, step: int) -> StepData:
        indices = step_indices(step, self.global_size, len(self.samples), self.seed)
        digest = hashlib.sha256("\n".join(map(self.samples.key, indices)).encode()).hexdigest()[:16]
        data = self._loaded(step, indices, digest)
        if not data.fitting:
            raise RunError(
                f"data.sequence_length: step {step + 1}: none of its {len(indices)} samples fits {self.tokenize.sequence_length} "
                f"tokens, images counted; raise it"
            )
        return data

    def in_order(self, first: int, last: int) -> Iterator[StepData]:
        """Samples `first` to `last` (exclusive) as they lie in the shards, a global batch at a time."""
        runs = [range(at, min(at + self.global_size, last)) for at in range(first, last, self.global_size)]
        return _ahead(lambda run: self._loaded(run.start, run, ""), runs)

    def _loaded(self, step: int, indices: Sequence[int], digest: str) -> StepData:
        """Every rank tokenizes the whole batch, for the plan follows from all lengths, and reads its own share's images."""
        fitting: list[Chosen] = []
        dropped: list[Dropped] = []
        for index in indices:
            try:
                fitting.append((index, self.tokenized(index)))
            except BadSample as bad:
                dropped.append(self._left_out(index, bad))
        sizes = [Size(sample.length, sample.sequences, self.flops(sample)) for _, sample in fitting]
        plan = plan_micro_batches(sizes, self.size, self.micro_tokens, self.micro_images)
        share = [[fitting[i] for i in chosen] for chosen in plan[self.rank]]
        batches, kept, bad_ones = self._micro_batches(share)
        told = tuple(dropped) if self.rank == 0 else ()
        return StepData(step, batches, told, digest, len(fitting), kept, bad_ones)

    def without(self, data: StepData, indices: Collection[int]) -> StepData:
        """`data` but for these samples."""
        share = [[one for one in chosen if one[0] not in indices] for chosen in data.chosen]
        batches, kept, _ = self._micro_batches(share)
        return replace(data, chosen=kept, micro_batches=batches)

    def with_reference(self, data: StepData) -> StepData:
        """`data` with its reference log-probs, where this loader has them."""
        if not self.reference:
            return data
        found = map(self._reference, data.chosen)
        batches = (replace(batch, reference=logps) for batch, logps in zip(data.micro_batches, found, strict=True))
        return replace(data, micro_batches=tuple(batches))

    def tokenized(self, index: int) -> Tokenized:
        """Raises DoesNotFit for a sample that is too long, BadSample for one that is wrong."""
        return self.tokenize(self.samples.read(index, images=False), self._views(index))

    def _left_out(self, index: int, bad: BadSample) -> Dropped:
        """Raises RunError for a broken sample that is not to be skipped."""
        if not isinstance(bad, DoesNotFit) and not self.skip_bad:
            raise RunError(f"data.shards: {bad}; mend or remove it, or set data.on_bad_sample: skip") from None
        return Dropped.of(index, bad)

    def _views(self, index: int) -> list[View] | None:
        """Of a sample's images, None where all images' are one and the same."""
        if self.images.fixed is not None:
            return None
        try:
            return [self.images.view(*size) for size in self.samples.image_sizes(index)]
        except ImageError as error:
            raise BadSample(self.samples.key(index), "bad_image", str(error)) from None

    def _micro_batches(
        self, share: Sequence[Sequence[Chosen]]
    ) -> tuple[tuple[PackedBatch, ...], tuple[tuple[Chosen, ...], ...], tuple[Dropped, ...]]:
        """Batches, what each is made of, and what cannot be decoded."""
        bad: list[Dropped] = []
        made = [self._micro_batch(chosen, bad) for chosen in share]
        return tuple(batch for batch, _ in made), tuple(kept for _, kept in made), tuple(bad)

    def _micro_batch(self, chosen: Sequence[Chosen], bad: list[Dropped]) -> tuple[PackedBatch, tuple[Chosen, ...]]:
        kept: list[Chosen] = []
        index: list[int] = []
        known: dict[bytes, tuple[int, torch.Tensor]] = {}
        for at, sample in chosen:
            fresh = dict(known)
            places: list[int] = []
            try:
                for image in self._images(at, len(sample.images)):
                    # Samples over one and the same image share its pass through the encoder.
                    number = len(index) + len(places)
                    digest = hashlib.blake2b(image, digest_size=16).digest() if image else number.to_bytes(8, "big")
                    if digest not in fresh:
                        fresh[digest] = len(fresh), self._pixels(sample.key, image)
                    places.append(fresh[digest][0])
            except BadSample as error:
                bad.append(self._left_out(at, error))
                continue
            kept.append((at, sample))
            known, index = fresh, [*index, *places]
        pixels = [image for _, image in known.values()]
        samples = [sample for _, sample in kept]
        return pack(samples, pixels, self.tokenize.branches, self.pack_multiple, index), tuple(kept)

    def _reference(self, chosen: Sequence[Chosen]) -> torch.Tensor:
        found = [torch.zeros(0)]
        for index, sample in chosen:
            folder, position = self.samples.place(index)
            found.append(self.reference[folder].logprobs(position, sample))
        return torch.cat(found)

    def _images(self, index: int, count: int) -> list[bytes]:
        """The encoded images of a sample, in the order of its places; empty where this rank needs none."""
        if not self.with_images or not count:
            return [b""] * count
        sample = self.samples.read(index)
        rejected = sample.rejected_image if isinstance(sample, Pair) else None
        images = [image for image in (sample.image, rejected) if image is not None]
        if isinstance(sample, Pair) and sample.image == rejected and sample.chosen.strip() == sample.rejected.strip():
            raise BadSample(sample.key, "identical_answers", "both answers and both images are the same")
        return images[:count]

    def _pixels(self, key: str, image: bytes) -> torch.Tensor:
        if not self.with_images:
            return torch.zeros(0)
        try:
            return self.images.pixels(image, self.image_backend)
        except ImageError as error:
            raise BadSample(key, "bad_image", str(error)) from None


def _ahead(load: Callable[[T], StepData], arguments: Iterable[T]) -> Iterator[StepData]:
    with ThreadPoolExecutor(max_workers=2, thread_name_prefix="loader") as pool:
        ahead: list[Future[StepData]] = []
        for argument in arguments:
            ahead.append(pool.submit(load, argument))
            if len(ahead) > 2:
                yield ahead.pop(0).result()
        for future in ahead:
            yield future.result()
