"""Seconds of a step, from what its kernels do and what a machine does in a second."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pivot_megatron.config.schema import Layout, Precision
from pivot_megatron.plan.layer_work import Operation
from pivot_megatron.plan.machine import Links, Machine, Rates
from pivot_megatron.plan.memory import weight_bytes
from pivot_megatron.plan.model_work import Part, Work


@dataclass(frozen=True)
class Passage:
    """Seconds that one micro-batch's way through a chunk or stage takes: computing, by part, and messages between
    tensor-parallel ranks."""

    encoder: float = 0.0
    head: float = 0.0
    messages: float = 0.0

    @property
    def total(self) -> float:
        return self.encoder + self.head + self.messages

    def __add__(self, other: Passage) -> Passage:
        return Passage(self.encoder + other.encoder, self.head + other.head, self.messages + other.messages)

    def scaled(self, factor: float) -> Passage:
        return Passage(factor * self.encoder, factor * self.head, factor * self.messages)


def seconds(op: Operation, rates: Rates, links: Links, back: bool) -> float:
    if op.kind == "gemm":
        line = rates.gemm[op.dtype]
        return op.launches * line.seconds + max(op.flops / line.flops, op.traffic / line.bandwidth)
    if op.kind == "attention":
        kernel = rates.attention[op.dtype]
        again = op.name.endswith("again")
        rate = kernel.backward if back and not again else kernel.forward
        return op.launches * kernel.seconds + op.flops / rate
    if op.kind == "elementwise":
        return op.launches * rates.launch + op.traffic / rates.elementwise
    return links.of(op.collective).time(op.traffic, op.launches)


def passage(work: Work, rates: Rates, links: Links) -> Passage:
    """`links`: between tensor-parallel ranks."""

    def of(part: Part, messages: bool) -> float:
        ways: tuple[tuple[Mapping[Part, Iterable[Operation]], bool], ...] = (
            (work.forward, False),
            (work.backward, True),
        )
        return sum(
            seconds(op, rates, links, back)
            for way, back in ways
            for op in way[part]
            if (op.kind == "message") == messages
        )

    return Passage(of("encoder", False), of("head", False), of("encoder", True) + of("head", True))


@dataclass(frozen=True)
class Ends:
    """What a step takes besides its micro-batches, on the stage where that is longest: seconds for `gradients` (their
    reduction over replicas, and of tied embeddings over the first and the last stage), for the `update` with the gradient's
    norm and clipping, and to `gather` the weights."""

    gradients: float
    update: float
    gather: float

    @property
    def total(self) -> float:
        return self.gradients + self.update + self.gather


def ends(
    trained: int,
    layout: Layout,
    precision: Precision,
    machine: Machine,
    data_parallel: int,
    backward_seconds: float,
    shared_words: int,
) -> Ends:
    """`trained`: weights of a rank that train. `backward_seconds`: of one micro-batch, in which an overlapped reduction hides, as
    a gather does in the next forward pass. `shared_words`: entries of tied embeddings that two stages hold; 0 where one does."""
    processes = layout.model_parallel_size * data_parallel
    rates = machine.rates_of(processes)
    size = weight_bytes(precision)
    share = (data_parallel - 1) / data_parallel
    links, several = machine.links(data_parallel, layout.tensor, processes), data_parallel > 1
    reduced = links.scatter.time(4.0 * trained * share) if several else 0.0
    gathered = links.gather.time(size * trained * share) if several else 0.0
    if layout.overlap_gradient_reduce:
        reduced = max(0.0, reduced - backward_seconds)
    if layout.overlap_parameter_gather:
        gathered = max(0.0, gathered - backward_seconds / 2)
    if shared_words:
        far = machine.pairs(layout.pipeline, processes // layout.pipeline, processes).reduce
        reduced += far.seconds + 4.0 * shared_words / far.bandwidth
    # The buffer is zeroed whole; a replica's share is read for the norm, scaled, and read and written by Adam: weight,
    # gradient and two moments, and once more in 16 bits.
    touched = 4.0 * trained + trained / data_parallel * (4 + 8 + 28 + (size if size == 2 else 0))
    return Ends(reduced, touched / rates.update, gathered)
