"""What one process measures of its device while the others measure the same: seconds of kernels of many shapes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

from pivot_megatron.config.schema import Precision
from pivot_megatron.model.swiglu import SwiGlu
from pivot_megatron.plan.layer_work import NORM_PASSES, RESIDUAL_PASSES, SWIGLU_PASSES
from pivot_megatron.plan.workload import visible
from pivot_megatron.runtime.attention import Heads, Kernel, Spans, build_kernel
from pivot_megatron.runtime.device import Platform, current_platform
from pivot_megatron.runtime.memory import peak_memory
from pivot_megatron.runtime.norm import RmsNorm
from pivot_megatron.runtime.stopwatch import Stopwatch

_LEAST = 0.04  # seconds that a kernel is run for before its time is taken, and how often that is done
_TIMES = 7
_PAST_CACHES = 400e6  # bytes that a kernel's operands are taken from in turn
_MOST_COPIES = 100
_MESSAGES = 20  # collective calls of which a GPU's time is taken together
_REDUCED = 100_000_000  # float32 numbers, of all processes together
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Sample:
    """`what` was done once, in so many `seconds`; `kernel` names its shape. `traffic` in bytes."""

    what: str
    kernel: str
    dtype: str
    flops: float
    traffic: float
    seconds: float


@dataclass(frozen=True)
class Sizes:
    """Tokens of a micro-batch, (rows, columns) of weights, and (query heads, groups, width, tokens, causal) of attention: those
    that models for such a machine have."""

    tokens: tuple[int, ...]
    weights: tuple[tuple[int, int], ...]
    attention: tuple[tuple[int, int, int, int, bool], ...]
    updated: int
    messages: tuple[int, ...]


CPU = Sizes(
    tokens=(120, 360, 720),
    weights=((384, 384), (1536, 384), (512, 512), (2816, 512), (512, 1408), (1024, 1024), (5632, 1024), (1024, 2816)),
    attention=((8, 2, 64, 680, True), (16, 4, 64, 680, True), (6, 6, 64, 576, False)),
    updated=20_000_000,
    messages=(4_096, 750_000, 1_500_000, 3_000_000, 40_000_000, 400_000_000),
)
GPU = Sizes(
    tokens=(1024, 4096, 8192),
    weights=((1152, 1152), (4352, 1152), (1536, 1536), (17920, 1536), (3584, 3584), (37888, 3584), (3584, 18944)),
    attention=((12, 2, 128, 836, True), (28, 4, 128, 836, True), (16, 16, 72, 576, False)),
    updated=200_000_000,
    messages=(16_384, 1_000_000, 4_000_000, 50_000_000, 400_000_000, 2_000_000_000),
)


def measure(precision: Precision) -> Iterator[Sample]:
    """Of this process's device; every process of the group takes part, each in step with the others."""
    sizes = GPU if current_platform().is_cuda else CPU
    yield from _products(sizes, precision.compute)
    yield from _attention(sizes, precision.compute)
    yield from _elementwise(sizes, precision.compute)
    yield _update(sizes)
    yield _launch()
    if dist.get_world_size() > 1:
        yield from _messages(sizes)


def seconds_of(run: Callable[[], object]) -> float:
    """Of one call, the least of several batches of calls: what else a machine does can only add to it."""
    watch = Stopwatch(current_platform())
    run()
    dist.barrier()
    calls = 1
    found: list[float] = []
    while len(found) < _TIMES:
        watch.start()
        for _ in range(calls):
            run()
        watch.stop()
        seconds = watch.reset()
        if seconds < _LEAST / 2:
            calls = max(2 * calls, int(calls * _LEAST / max(seconds, 1e-7)))
        else:
            found.append(seconds / calls)
    return min(found)


def messages_seconds(run: Callable[[], object]) -> float:
    """Of one collective call: every process makes as many. Of GPUs' own time, the host's alone being that of a launch."""
    platform = current_platform()
    dist.barrier()
    if platform.is_cuda:
        return _batches_seconds(run, platform)
    found = []
    for _ in range(3 * _TIMES):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return min(found)


def _batches_seconds(run: Callable[[], object], platform: Platform) -> float:
    watch, found = Stopwatch(platform), []
    run()
    for _ in range(_TIMES):
        dist.barrier()  # before the time is taken, which it would be part of
        watch.start()
        for _ in range(_MESSAGES):
            run()
        watch.stop()
        found.append(watch.reset() / _MESSAGES)
    return min(found)


def _products(sizes: Sizes, dtype: str) -> Iterator[Sample]:
    """A linear's forward product, and both of its backward pass, as torch lays them out, on operands that no cache holds: so a
    model's are, of which each layer has its own."""
    size = DTYPES[dtype].itemsize
    for m in sizes.tokens:
        for n, k in sizes.weights:
            traffic = float(size * (m * n + n * k + m * k))
            copies = max(1, min(_MOST_COPIES, int(_PAST_CACHES // traffic)))
            made = [_operands(m, n, k, dtype) for _ in range(copies)]
            ways = {
                "forward": [(x, w.t(), y) for x, w, y in made],
                "input": [(y, w, x) for x, w, y in made],
                "weight": [(y.t(), x, w) for x, w, y in made],
            }
            for name, operands in ways.items():
                seconds = seconds_of(_products_in_turn(operands))
                yield Sample("gemm", f"{name} {m}x{n}x{k}", dtype, 2.0 * m * n * k, traffic, seconds)


def _operands(m: int, n: int, k: int, dtype: str) -> tuple[Tensor, ...]:
    """A linear's input, weight and output."""
    device, kind = current_platform().device, DTYPES[dtype]
    return tuple(torch.randn(shape, device=device, dtype=kind) for shape in ((m, k), (n, k), (m, n)))


def _products_in_turn(operands: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Callable[[], object]:
    turns = cycle(operands)

    def run() -> None:
        a, b, out = next(turns)
        torch.mm(a, b, out=out)

    return run


def _attention(sizes: Sizes, dtype: str) -> Iterator[Sample]:
    device, kind = current_platform().device, DTYPES[dtype]
    for heads, groups, width, tokens, causal in sizes.attention:
        kernel = build_kernel(Heads(heads, groups, width, width**-0.5, causal), kind)
        ends = torch.tensor([0, tokens], dtype=torch.int32, device=device)
        spans = Spans(((tokens, tokens),), ends, ends)
        q, k, v = (
            torch.randn(tokens, n, width, device=device, dtype=kind, requires_grad=True)
            for n in (heads, groups, groups)
        )
        seen = visible([(tokens, tokens)]) if causal else float(tokens**2)
        flops = 4.0 * seen * heads * width
        name = f"{heads} heads of {width}, {tokens} tokens{', causal' if causal else ''}"
        out = kernel(q, k, v, spans)
        slope = torch.randn_like(out)

        def forward(q: Tensor = q, k: Tensor = k, v: Tensor = v, kernel: Kernel = kernel, spans: Spans = spans) -> None:
            with torch.no_grad():
                kernel(q, k, v, spans)

        def backward(
            out: Tensor = out, slope: Tensor = slope, inputs: Sequence[Tensor] = (q, k, v)
        ) -> tuple[Tensor, ...]:
            return torch.autograd.grad(out, list(inputs), slope, retain_graph=True)

        yield Sample("attention forward", name, dtype, flops, 0.0, seconds_of(forward))
        yield Sample("attention backward", name, dtype, 2.5 * flops, 0.0, seconds_of(backward))


def _elementwise(sizes: Sizes, dtype: str) -> Iterator[Sample]:
    """Norms, activations and residual sums, forward and backward, with the traffic that plans count for them."""
    device, kind = current_platform().device, DTYPES[dtype]
    tokens = max(sizes.tokens)
    for columns, rows in {c: r for r, c in sizes.weights}.items():  # each width once
        norm, swiglu = RmsNorm(columns, 1e-6, kind).to(device), SwiGlu(None)
        bytes_each = 3 * tokens * (columns + rows) * kind.itemsize
        copies = range(max(1, min(_MOST_COPIES, int(_PAST_CACHES // bytes_each))))
        narrow = cycle([_with_slope(tokens, columns, columns, kind) for _ in copies])
        wide = cycle([_with_slope(tokens, 2 * rows, rows, kind) for _ in copies])

        def normed(norm: RmsNorm = norm, turns: Iterator[tuple[Tensor, Tensor]] = narrow) -> None:
            x, slope = next(turns)
            torch.autograd.grad(norm(x), [x, norm.weight], slope)

        def gated(swiglu: SwiGlu = swiglu, turns: Iterator[tuple[Tensor, Tensor]] = wide) -> None:
            both, slope = next(turns)
            torch.autograd.grad(swiglu(both), both, slope)

        def summed(turns: Iterator[tuple[Tensor, Tensor]] = narrow) -> None:
            with torch.no_grad():
                torch.add(*next(turns))

        touched: dict[str, tuple[Callable[[], object], float]] = {
            "norm": (normed, sum(NORM_PASSES["RMSNorm"]) * tokens * columns),
            "swiglu": (gated, sum(SWIGLU_PASSES) * tokens * rows),
            "residual": (summed, RESIDUAL_PASSES[0] * tokens * columns),
        }
        for name, (run, entries) in touched.items():
            width = rows if name == "swiglu" else columns
            traffic = kind.itemsize * entries
            yield Sample("elementwise", f"{name} {tokens}x{width}", dtype, 0.0, traffic, seconds_of(run))


def _with_slope(tokens: int, columns: int, out: int, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """An input, and what comes back to its output."""
    device = current_platform().device
    x = torch.randn(tokens, columns, device=device, dtype=kind, requires_grad=True)
    return x, torch.randn(tokens, out, device=device, dtype=kind)


def _update(sizes: Sizes) -> Sample:
    """The passes of an optimizer step over float32 weights: zeroed gradients, their norm, clipping, Adam."""
    device = current_platform().device
    weight, grad, first, second = (torch.rand(sizes.updated, device=device) for _ in range(4))
    step = torch.tensor(1.0, device=device)
    options = {"beta1": 0.9, "beta2": 0.999, "lr": 1e-6, "weight_decay": 0.0, "eps": 1e-8}

    def run() -> None:
        grad.zero_()
        torch.linalg.vector_norm(grad)
        grad.mul_(0.9)
        adamw(
            [weight],
            [grad],
            [first],
            [second],
            [],
            [step],
            fused=True,
            amsgrad=False,
            maximize=False,
            **options,  # type: ignore[arg-type]
        )

    return Sample("update", f"{sizes.updated} weights", "fp32", 0.0, 44.0 * sizes.updated, seconds_of(run))


def _launch() -> Sample:
    few = torch.zeros(16, device=current_platform().device)
    return Sample("launch", "sum of 16", "fp32", 0.0, 0.0, seconds_of(lambda: few.add(1.0)))


def _messages(sizes: Sizes) -> Iterator[Sample]:
    """Collectives over all processes, with the bytes that one sends in a ring, and messages to the next process."""
    device, world, rank = current_platform().device, dist.get_world_size(), dist.get_rank()
    share = (world - 1) / world
    for size in sizes.messages:
        whole = torch.zeros(world * -(-size // (4 * world)), device=device)
        part = torch.zeros(whole.numel() // world, device=device)
        sent = share * whole.numel() * 4
        for kind, run, traffic in (
            ("gather", partial(dist.all_gather_into_tensor, whole, part), sent),
            ("scatter", partial(dist.reduce_scatter_tensor, part, whole), sent),
            ("reduce", partial(dist.all_reduce, whole), 2 * sent),
            ("send", partial(_pass_on, part, rank, world), part.numel() * 4.0),
        ):
            there_and_back = 2 if kind == "send" else 1
            yield Sample(kind, str(size), "fp32", 0.0, traffic, messages_seconds(run) / there_and_back)


def _pass_on(part: Tensor, rank: int, world: int) -> None:
    """From the first process to the second and back, half of which is one message."""
    if rank < 2 <= world:
        for source in (0, 1):
            (dist.send(part, 1 - rank) if rank == source else dist.recv(part, 1 - rank))


def reduction_copy() -> float:
    """Bytes that a reduction over all processes takes beside each of its buffer's. To be called before anything has taken, and
    given back, more memory than that."""
    world = dist.get_world_size()
    buffer = torch.ones(_REDUCED // world**2 * world, device=current_platform().device)
    whole = buffer.numel() * buffer.element_size()
    part = buffer.chunk(world)[dist.get_rank()]
    before = peak_memory()
    dist.reduce_scatter_tensor(part, buffer)
    return (peak_memory() - before) / whole
