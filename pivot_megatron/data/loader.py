"""From shards to micro-batches: reads ahead in threads, in the one global order, from any step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Protocol, TypeVar

import torch

from pivot_megatron.data.batch import PackedBatch
from pivot_megatron.data.decoders import Decoded, Decoder
from pivot_megatron.data.images import ImageError
from pivot_megatron.data.order import Order
from pivot_megatron.data.packing import pack
from pivot_megatron.data.pair_set import PairSet
from pivot_megatron.data.plan import Shown, Size, plan_micro_batches
from pivot_megatron.data.reference import ReferenceFile, images_digest
from pivot_megatron.data.sample import BadSample, Pair
from pivot_megatron.data.tokens import DoesNotFit, SampleTokenizer, Tokenized
from pivot_megatron.data.views import ImageViews, View
from pivot_megatron.errors import RuleError

T = TypeVar("T")


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


class Work(Protocol):
    """Estimates work, in any one unit."""

    def images(self, sequences: Sequence[int]) -> float:
        """Of images, or tiles, of so many patches each."""

    def text(self, segments: Sequence[tuple[int, int]], answers: int) -> float:
        """Of segments of (queries, keys) tokens, with logits at `answers` places."""


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
    """`with_images`: whether this rank's pipeline stage runs the encoder; elsewhere no image is read. `decoder` opens what
    decodes images; `workers`: whether steps are made ahead, in threads. `work`: of samples, by which micro-batches
    are balanced. `reference`: the files of the folders of `samples`, where batches bring their reference
    log-probs.

    A sample that does not fit leaves its place in the batch empty, so that neither the order nor any other rank depends on
    it: losses are sums over what is there. Whether it fits is seen from its text, so every rank decides alike. A sample that
    is broken stops the run with its name, or leaves its place empty too where `skip_bad`: one whose image is broken on the
    ranks that decode it, which others follow by `without`. `pinned`: batches come in memory that a CUDA device copies from while
    the host goes on.
    """

    samples: PairSet
    order: Order
    tokenize: SampleTokenizer
    images: ImageViews
    decoder: Callable[[], AbstractContextManager[Decoder]]
    workers: int
    work: Work
    global_size: int
    micro_tokens: int
    micro_images: int | None
    pack_multiple: int
    micro_batch_multiple: int
    rank: int
    size: int
    with_images: bool
    reference: Sequence[ReferenceFile] = ()
    skip_bad: bool = False
    pinned: bool = False

    def steps(self, first: int, last: int) -> Iterator[StepData]:
        """Steps `first` to `last` (exclusive), with `workers` two ahead of what is asked for."""
        with self.decoder() as decode:
            yield from _ahead(partial(self._load, decode), range(first, last), self.workers)

    def load(self, step: int) -> StepData:
        with self.decoder() as decode:
            return self._load(decode, step)

    def _load(self, decode: Decoder, step: int) -> StepData:
        indices = self.order.batch(step, self.global_size)
        digest = hashlib.sha256("\n".join(map(self.samples.key, indices)).encode()).hexdigest()[:16]
        data = self._loaded(decode, step, indices, digest)
        if not data.fitting:
            raise RuleError(
                f"data.sequence_length: step {step + 1}: none of its {len(indices)} samples is sound and fits "
                f"{self.tokenize.sequence_length} tokens, images counted; raise it, or mend the samples"
            )
        return data

    def in_order(self, first: int, last: int) -> Iterator[StepData]:
        """Samples `first` to `last` (exclusive) as they lie in the shards, a global batch at a time."""
        runs = [range(at, min(at + self.global_size, last)) for at in range(first, last, self.global_size)]
        with self.decoder() as decode:
            yield from _ahead(lambda run: self._loaded(decode, run.start, run, ""), runs, self.workers)

    def _loaded(self, decode: Decoder, step: int, indices: Sequence[int], digest: str) -> StepData:
        """Every rank tokenizes the whole batch, for the plan follows from all lengths, and reads its own share's images."""
        self.samples.warm(indices)
        fitting: list[Chosen] = []
        dropped: list[Dropped] = []
        for index in indices:
            try:
                fitting.append((index, self.tokenized(index)))
            except BadSample as bad:
                dropped.append(self._left_out(index, bad))
        sizes = [self._size(*one) for one in fitting]
        limits = (self.micro_tokens, self.micro_images, self.micro_batch_multiple)
        plan = plan_micro_batches(sizes, self.size, *limits)
        share = [[fitting[i] for i in chosen] for chosen in plan[self.rank]]
        batches, kept, bad_ones = self._micro_batches(decode, share)
        told = tuple(dropped) if self.rank == 0 else ()
        return StepData(step, batches, told, digest, len(fitting), kept, bad_ones)

    def _size(self, index: int, sample: Tokenized) -> Size:
        answers = sum(sum(branch.loss) for branch in sample.branches)
        images = [
            Shown(name, len(view.grids), self.work.images([rows * columns for rows, columns in view.grids]))
            for name, view in zip(self.samples.image_names(index), sample.views, strict=False)
        ]
        flops = sum(image.flops for image in images) + self.work.text(sample.segments, answers)
        return Size(sample.length, sample.sequences, flops, tuple(image for image in images if image.name))

    def without(self, data: StepData, indices: Collection[int]) -> StepData:
        """`data` but for these samples."""
        share = [[one for one in chosen if one[0] not in indices] for chosen in data.chosen]
        with self.decoder() as decode:
            batches, kept, _ = self._micro_batches(decode, share)
        return replace(data, chosen=kept, micro_batches=batches)

    def with_reference(self, data: StepData) -> StepData:
        """`data` with its reference log-probs, where this loader has them."""
        if not self.reference:
            return data
        found = map(self._reference, data.chosen, data.micro_batches)
        batches = (replace(batch, reference=logps) for batch, logps in zip(data.micro_batches, found, strict=True))
        return replace(data, micro_batches=tuple(batches))

    def tokenized(self, index: int) -> Tokenized:
        """Raises DoesNotFit for a sample that is too long, BadSample for one that is wrong."""
        return self.tokenize(self.samples.read(index, images=False), self._views(index))

    def _left_out(self, index: int, bad: BadSample) -> Dropped:
        """Raises RuleError for a broken sample that is not to be skipped."""
        if not isinstance(bad, DoesNotFit) and not self.skip_bad:
            raise RuleError(f"data.shards: {bad}; mend or remove it, or set data.on_bad_sample: skip") from None
        return Dropped.of(index, bad)

    def _views(self, index: int) -> list[View] | None:
        """Of a sample's images, None where all images' are one and the same."""
        if self.images.fixed is not None:
            return None
        return [self.images.view(*size) for size in self.samples.image_sizes(index)]

    def _micro_batches(
        self, decode: Decoder, share: Sequence[Sequence[Chosen]]
    ) -> tuple[tuple[PackedBatch, ...], tuple[tuple[Chosen, ...], ...], tuple[Dropped, ...]]:
        """Batches, what each is made of, and what cannot be decoded."""
        bad: list[Dropped] = []
        made = [self._micro_batch(decode, chosen, bad) for chosen in share]
        return tuple(batch for batch, _ in made), tuple(kept for _, kept in made), tuple(bad)

    def _micro_batch(
        self, decode: Decoder, chosen: Sequence[Chosen], bad: list[Dropped]
    ) -> tuple[PackedBatch, tuple[Chosen, ...]]:
        read: list[tuple[Chosen, list[bytes], list[bytes]]] = []
        for at, sample in chosen:
            try:
                images = self._images(at, len(sample.images))
            except BadSample as error:
                bad.append(self._left_out(at, error))
                continue
            # Samples over one and the same image share its pass through the encoder.
            names = [_digest(image) if image else f"{len(read)} {n}".encode() for n, image in enumerate(images)]
            read.append(((at, sample), names, images))
        encoded = {name: image for _, names, images in read for name, image in zip(names, images, strict=True)}
        decoded = dict(zip(encoded, self._decoded(decode, list(encoded.values())), strict=True))
        kept: list[Chosen] = []
        index: list[bytes] = []
        digests: list[bytes] = []
        for (at, sample), names, _ in read:
            broken = [found for name in names if isinstance(found := decoded[name], ImageError)]
            if broken:
                bad.append(self._left_out(at, BadSample(sample.key, "bad_image", str(broken[0]))))
                continue
            kept.append((at, sample))
            index += names
            digests.append(images_digest(names))
        places = {name: n for n, name in enumerate(dict.fromkeys(index))}
        pixels = [image for name in places if isinstance(image := decoded[name], torch.Tensor)]
        samples = [sample for _, sample in kept]
        rows = [places[name] for name in index]
        batch = pack(samples, pixels, self.tokenize.branches, self.pack_multiple, rows)
        if self.with_images:
            batch = replace(batch, image_digests=tuple(digests))
        return (batch.pinned() if self.pinned else batch), tuple(kept)

    def _decoded(self, decode: Decoder, encoded: Sequence[bytes]) -> Sequence[Decoded]:
        """Nothing of each image on a rank that has no encoder to show it to."""
        return decode(encoded) if self.with_images else [torch.zeros(0)] * len(encoded)

    def _reference(self, chosen: Sequence[Chosen], batch: PackedBatch) -> torch.Tensor:
        found = [torch.zeros(0)]
        for (index, sample), images in zip_longest(chosen, batch.image_digests):
            folder, position = self.samples.place(index)
            found.append(self.reference[folder].logprobs(position, sample, images))
        return torch.cat(found)

    def _images(self, index: int, count: int) -> list[bytes]:
        """The encoded images of a sample, in the order of its places; empty where this rank needs none."""
        if not self.with_images or not count:
            return [b""] * count
        sample = self.samples.read(index)
        rejected = sample.rejected_image if isinstance(sample, Pair) else None
        images = [image for image in (sample.image, rejected) if image is not None]
        return images[:count]


def _digest(image: bytes) -> bytes:
    return hashlib.blake2b(image, digest_size=16).digest()


def _ahead(load: Callable[[T], StepData], arguments: Iterable[T], workers: int) -> Iterator[StepData]:
    """In order. Whoever stops asking, or an error, ends the threads: what they have not begun is not begun any more."""
    if not workers:
        yield from map(load, arguments)
        return
    pool = ThreadPoolExecutor(min(workers, 2), thread_name_prefix="loader")
    try:
        ahead: list[Future[StepData]] = []
        for argument in arguments:
            ahead.append(pool.submit(load, argument))
            if len(ahead) > 2:
                yield ahead.pop(0).result()
        for future in ahead:
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
