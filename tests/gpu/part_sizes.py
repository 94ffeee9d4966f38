"""A DPO step at true sizes with random weights: time, tokens a second, share of what the device multiplies at, peak memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from pivot_megatron.bench.flops import PairLengths, pivot_work, step
from pivot_megatron.config.schema import Fp8, Layout, Precision
from pivot_megatron.data.tokens import Tokenized
from pivot_megatron.model.composition import Architecture
from pivot_megatron.runtime.device import current_platform
from pivot_megatron.runtime.distributed import process_groups
from pivot_megatron.train.step import train_step
from tests.gpu.machine import forget_peak, peak_gib, product_rate, seconds
from tests.gpu.models import QWEN_05B, QWEN_15B, SO400M, TINY, architecture, batch_of, built, offered, pairs, trainee
from tests.gpu.rows import Row, told

PRECISIONS: Mapping[str, Precision] = {
    "bf16": Precision("bf16"),
    "FP8 tensorwise": Precision("bf16", Fp8("tensorwise")),
    "FP8 tensorwise, llm alone": Precision("bf16", Fp8("tensorwise", encoder=False)),
    "FP8 blockwise": Precision("bf16", Fp8("blockwise")),
}
FOR_EVER = 10**9  # epochs that the reference's forward pass is shared over: it is no part of these steps


def rows() -> Iterator[Row]:
    cuda = current_platform().is_cuda
    models = {"tiny": TINY}
    if cuda:
        models = {
            "So400m/16 + Qwen2.5-0.5B": architecture(SO400M, QWEN_05B),
            "So400m/16 + Qwen2.5-1.5B": architecture(SO400M, QWEN_15B),
        }
    peak = product_rate(8192 if cuda else 256)
    yield told(
        "bf16 products of 8192 by 8192, TFLOP/s" if cuda else "bf16 products of 256 by 256, TFLOP/s", peak / 1e12
    )
    for model, arch in models.items():
        for name, precision in offered(PRECISIONS, "fp32").items():
            try:
                yield from measured(f"{model}, {name}", arch, precision, peak)
            except Exception as error:  # the other precisions go on
                yield Row(
                    f"{model}, {name}", f"{type(error).__name__}: {str(error).splitlines()[0][:160]}", passed=False
                )
            gc.collect()


def measured(name: str, arch: Architecture, precision: Precision, peak: float) -> Iterator[Row]:
    """Two micro-batches of eight pairs, of 576 image tokens, about 64 of prompt and 128 of each answer."""
    cuda = current_platform().is_cuda
    per_batch, prompt, answer = (8, 64, 128) if cuda else (2, 4, 6)
    with process_groups(Layout(), seed=1):
        forget_peak()
        samples = [pairs(arch, per_batch, prompt, answer, seed=n) for n in (1, 2)]
        batches = [batch_of(arch, some, 128, seed=n) for n, some in enumerate(samples)]
        # Log-probs of no model in particular: what they are changes no time.
        batches = [replace(b, reference=torch.full(b.targets.shape, -10.0)) for b in batches]
        run = trainee(built(arch, precision), precision, steps=20, learning_rate=1e-6)
        taken = seconds(
            lambda: train_step(run.wrapped, run.optimization, run.objective, batches, None),
            warm_up=3 if cuda else 1,
            repeats=7 if cuda else 1,
        )
    tokens = sum(batch.length for batch in batches)
    images = sum(batch.pixels.shape[0] for batch in batches)
    work = sum(step(arch, pivot_work([_lengths(s) for s in some]), FOR_EVER).total for some in samples)
    yield told(f"{name}: seconds a step", taken)
    yield told(f"{name}: tokens a second", tokens / taken)
    yield told(f"{name}: pairs a second", images / taken)
    yield told(f"{name}: TFLOP/s", work / taken / 1e12)
    yield told(f"{name}: MFU, of the bf16 products above", work / taken / peak)
    yield told(f"{name}: peak memory, GiB", peak_gib())


def _lengths(sample: Tokenized) -> PairLengths:
    chosen, rejected = (len(branch.ids) for branch in sample.branches)
    return PairLengths(len(sample.prefix), chosen, rejected, chosen + rejected)
