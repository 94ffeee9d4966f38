"""What each process does to train in the parity tests: steps, their gradients and what they moved."""

from __future__ import annotations

import unittest.mock
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

import pivot_megatron.runtime  # noqa: F401  (before megatron.core)
from pivot_megatron.config.schema import (
    AnyRes,
    Batch,
    Component,
    Data,
    Dpo,
    Encoder,
    Layout,
    Model,
    Optimizer,
    ParameterRule,
    Precision,
    Recompute,
    RunConfig,
    Sft,
)
from pivot_megatron.convert.gather import hf_tensors
from pivot_megatron.convert.load import hf_source
from pivot_megatron.convert.plan import Slice, component_rows
from pivot_megatron.data.batch import PackedBatch
from pivot_megatron.data.packing import pack
from pivot_megatron.model import vocabulary
from pivot_megatron.model.composition import Stage
from pivot_megatron.objective.build import build_objective
from pivot_megatron.runtime.device import Platform, current_platform
from pivot_megatron.train.optimizer import apply_rules, build_optimization, wrap
from pivot_megatron.train.step import forward_logprobs, observed, train_step
from tests.parity.jobs import FP32, NOTHING_AGAIN, loaded_model, one_by_one

CLIP = 0.5

Shares = list[list[tuple[Any, ...]]]
"""For each data-parallel rank, its micro-batches: pairs, their images' pixels, and which image each place shows where it is not
one after another."""


def run_config(
    layout: Layout,
    encoder: Path,
    head: Path,
    objective: Sft | Dpo,
    rules: tuple[ParameterRule, ...] = (),
    precision: Precision = FP32,
) -> RunConfig:
    """Settings whose effect on the weights is not drowned in noise: gradients whose true value is zero (key biases) must not
    turn into a full Adam step, so epsilon is large; the clip is low enough to be in force."""
    return RunConfig(
        name="parity",
        out=Path("unused"),
        model=Model(encoder=Encoder(hf=encoder), llm=Component(hf=head)),
        objective=objective,
        data=Data(shards=(Path("unused"),)),
        optimizer=Optimizer(
            learning_rate=1e-3, schedule="constant", warmup_fraction=0.0, epsilon=1e-4, clip_gradient=CLIP
        ),
        batch=Batch(global_size=8, micro_tokens=4096, steps=10),
        layout=layout,
        precision=precision,
        parameters=rules,
        seed=5,
    )


def whole_gradients(wrapped: Sequence[Any]) -> None:
    """The distributed optimizer leaves each rank its own part of a reduced buffer: gather the parts, so that `main_grad`
    is whole."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    if group.size() == 1:
        return
    for buffer in (buffer for chunk in wrapped for buffer in chunk.buffers):
        for bucket in buffer.buckets:
            parts = bucket.grad_data.chunk(group.size())
            gathered = [torch.empty_like(parts[0]) for _ in parts]
            dist.all_gather(gathered, parts[group.rank()].contiguous(), group=group)
            bucket.grad_data.copy_(torch.cat(gathered))


def train_steps(
    layout: Layout,
    encoder: Path,
    head: Path,
    shares: Shares,
    objective: Sft | Dpo,
    steps: int,
    rules: tuple[ParameterRule, ...] = (),
    recompute: Recompute = NOTHING_AGAIN,
    tile_bytes: int | None = None,
    cached: bool = False,
    anyres: AnyRes | None = None,
    precision: Precision = FP32,
) -> dict[str, Any]:
    """`steps` optimizer steps on the same batch: the first's gradients and the last's weights as Hugging Face tensors.

    `tile_bytes`: how much of the logits may stand at once. `cached`: the reference's log-probs come with the batches.
    """
    with unittest.mock.patch.object(vocabulary, "current_platform", lambda: in_tiles(tile_bytes)):
        return _train_steps(
            layout, encoder, head, shares, objective, steps, rules, recompute, cached, anyres, precision
        )


def in_tiles(tile_bytes: int | None) -> Platform:
    platform = current_platform()
    return platform if tile_bytes is None else replace(platform, logits_tile_bytes=tile_bytes)


def _train_steps(
    layout: Layout,
    encoder: Path,
    head: Path,
    shares: Shares,
    objective: Sft | Dpo,
    steps: int,
    rules: tuple[ParameterRule, ...],
    recompute: Recompute,
    cached: bool,
    anyres: AnyRes | None,
    precision: Precision,
) -> dict[str, Any]:
    config = run_config(layout, encoder, head, objective, rules, precision)
    model = loaded_model(layout, encoder, head, recompute, anyres, precision)
    judge = build_objective(objective)
    reference = None
    if judge.needs_reference:
        reference = loaded_model(layout, encoder, head, anyres=anyres, precision=precision)
        reference.eval().requires_grad_(False)
    apply_rules(model, config.parameters)
    wrapped = wrap(model, layout)
    optimization = build_optimization(wrapped, config, steps=10)
    own = shares[parallel_state.get_data_parallel_rank()]
    batches = filled_up(
        [pack(samples, one_by_one(pixels), judge.branches, 4, *index) for samples, pixels, *index in own], layout
    )
    if cached:
        assert reference is not None
        known = forward_logprobs(reference, batches)
        batches = [replace(batch, reference=logps) for batch, logps in zip(batches, known, strict=True)]
        reference = None
    gradients: dict[str, Tensor] = {}
    plain = optimization.optimizer.prepare_grads

    def keep_gradients() -> Any:
        if not gradients:
            whole_gradients(wrapped)
            swapped = [(p, p.data, p.main_grad if p.requires_grad else torch.zeros_like(p)) for p in model.parameters()]
            for p, _, grad in swapped:
                p.data = grad.clone()
            gradients.update(hf_tensors(model))
            for p, data, _ in swapped:
                p.data = data
        return plain()

    optimization.optimizer.prepare_grads = keep_gradients
    results = []
    for _ in range(steps):
        results.append(train_step(wrapped, optimization, judge, batches, reference))
        judge = observed(judge, results[-1])
    if layout.overlap_parameter_gather:
        for chunk in wrapped:
            chunk.start_param_sync(force_sync=True)
    return {"gradients": gradients, "weights": hf_tensors(model), "results": results}


def filled_up(batches: list[PackedBatch], layout: Layout) -> list[PackedBatch]:
    """With empty ones, to as many as the layout's schedule takes."""
    return [*batches, *[pack([], [], 2, 4)] * (-len(batches) % layout.micro_batch_multiple)]


def one_step(layout: Layout, encoder: Path, head: Path, shares: Shares, objective: Dpo) -> dict[str, Any]:
    """Loss and gradient norm of an optimizer step, and encoder's and head's tensors that it left as they were."""
    config = run_config(layout, encoder, head, objective)
    model, judge = loaded_model(layout, encoder, head), build_objective(objective)
    wrapped = wrap(model, layout)
    optimization = build_optimization(wrapped, config, steps=10)
    own = shares[parallel_state.get_data_parallel_rank()]
    batches = filled_up(
        [pack(samples, one_by_one(pixels), judge.branches, 4, *index) for samples, pixels, *index in own], layout
    )
    known = forward_logprobs(model, batches)  # the model before its first step is its own reference
    batches = [replace(batch, reference=logps) for batch, logps in zip(batches, known, strict=True)]
    result = train_step(wrapped, optimization, judge, batches, None)
    unmoved = _unmoved(model, {"encoder": encoder, "llm": head})
    return {"loss": result.loss, "grad_norm": result.grad_norm, "unmoved": unmoved}


def _unmoved(model: Stage, folders: dict[str, Path]) -> list[str]:
    """But for a key's bias, which adds the same to every score: its true gradient is zero."""
    names = []
    for component, folder in folders.items():
        moved = set(_differing(model, component, folder))
        for row in component_rows(model.arch, component):
            bias = row.megatron.endswith("linear_qkv.bias")
            names += [part for n, part in enumerate(row.hf) if part not in moved and not (bias and n == 1)]
    return names


def _differing(model: Stage, component: str, folder: Path) -> list[str]:
    source, found = hf_source(model.arch, component, folder), hf_tensors(model)
    parts = [part for row in component_rows(model.arch, component) for part in row.hf]
    return [part for part in parts if not torch.equal(found[part], source.read(part, Slice()))]
