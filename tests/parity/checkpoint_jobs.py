"""What each process does with checkpoints in the parity tests: saves them, loads them, answers with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import pivot_megatron.runtime  # noqa: F401  (before megatron.core)
from pivot_megatron.config.schema import AnyRes, Component, Encoder, Layout, Model
from pivot_megatron.convert.gather import hf_tensors
from pivot_megatron.convert.plan import COMPONENTS
from pivot_megatron.convert.saving import save_weights
from pivot_megatron.convert.start import describe_start, start_weights
from pivot_megatron.convert.store import describe, load_weights
from pivot_megatron.data.batch import PackedBatch
from pivot_megatron.data.packing import pack
from pivot_megatron.data.tokens import Branch, Tokenized
from pivot_megatron.model.composition import Stage, build_model
from pivot_megatron.train.step import forward_logprobs
from tests.parity.jobs import FP32, NOTHING_AGAIN, loaded_model


def save_checkpoint(layout: Layout, encoder: Path, head: Path, out: Path, anyres: AnyRes | None = None) -> None:
    start = Model(encoder=Encoder(hf=encoder), llm=Component(hf=head), anyres=anyres)
    save_weights(loaded_model(layout, encoder, head, anyres=anyres), out, describe_start(start))


def of_checkpoint(layout: Layout, checkpoint: Path) -> Stage:
    model = build_model(describe(checkpoint).architecture(), layout, FP32, NOTHING_AGAIN)
    for component in COMPONENTS:
        load_weights(model, checkpoint, component)
    return model


def checkpoint_logprobs(layout: Layout, checkpoint: Path, batches: list[PackedBatch]) -> list[Tensor] | None:
    """Of each batch's targets, on the last stage."""
    found = forward_logprobs(of_checkpoint(layout, checkpoint).eval(), batches)
    return [one for one in found if one is not None] or None


def loaded_checkpoint(layout: Layout, checkpoint: Path) -> dict[str, Tensor]:
    return hf_tensors(of_checkpoint(layout, checkpoint))


def greedy(layout: Layout, checkpoint: Path, sample: Tokenized, pixels: list[Tensor], count: int) -> list[int]:
    """The likeliest next token after the sample's prefix, `count` times over."""
    model = of_checkpoint(layout, checkpoint)
    vocabulary, answer = model.arch.head.vocabulary, []
    for _ in range(count):
        branch = Branch((*answer, 0), (*[False] * len(answer), True))
        batch = pack([replace(sample, branches=(branch,))], pixels, branches_per_sample=1, multiple=4)
        # Every word as the target of the one token that predicts.
        every = replace(batch, predictors=batch.predictors.expand(vocabulary), targets=torch.arange(vocabulary))
        (logprobs,) = forward_logprobs(model.eval(), [every])
        assert logprobs is not None
        answer.append(int(logprobs.argmax()))
    return answer


def started(layout: Layout, start: Model) -> dict[str, Tensor]:
    """The weights that a run begins with."""
    model = build_model(describe_start(start).architecture(), layout, FP32, NOTHING_AGAIN)
    start_weights(model, start, seed=5)
    return hf_tensors(model)
