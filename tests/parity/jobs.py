"""What each process does in the parity tests. Top-level functions, so that processes can be sent them."""

from __future__ import annotations

import unittest.mock
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, gather_from_tensor_model_parallel_region
from torch import Tensor

import pivot_megatron.runtime  # noqa: F401  (before megatron.core)
from pivot_megatron.config.schema import (
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
from pivot_megatron.convert.load import (
    FreshParts,
    hf_source,
    load_component,
    parameters_by_global_name,
)
from pivot_megatron.convert.plan import COMPONENTS, part_shapes, rows_by_parameter
from pivot_megatron.convert.start import describe_start
from pivot_megatron.convert.store import describe, load_weights, save_weights
from pivot_megatron.data.batch import PackedBatch
from pivot_megatron.data.packing import pack
from pivot_megatron.data.tokens import Tokenized
from pivot_megatron.model import vocabulary
from pivot_megatron.model.composition import Architecture, VisionLanguageModel, build_model
from pivot_megatron.objective.build import build_objective
from pivot_megatron.runtime.device import Platform, current_platform
from pivot_megatron.train.optimizer import apply_rules, build_optimization, wrap
from pivot_megatron.train.step import forward_logprobs, observed, train_step

NOTHING_AGAIN = Recompute()


def architecture(encoder: Path, head: Path) -> Architecture:
    return describe_start(Model(encoder=Encoder(hf=encoder), llm=Component(hf=head))).architecture()


def loaded_model(
    layout: Layout, encoder: Path, head: Path, recompute: Recompute = NOTHING_AGAIN
) -> VisionLanguageModel:
    arch = architecture(encoder, head)
    model = build_model(arch, layout, Precision("fp32"), recompute)
    load_component(model, "encoder", hf_source(arch, "encoder", encoder))
    load_component(model, "llm", hf_source(arch, "llm", head))
    load_component(model, "projector", FreshParts(part_shapes(arch, "projector"), seed=5))
    return model


def packed(arch: Architecture, samples: Sequence[Tokenized], pixels: Tensor, multiple: int = 4) -> PackedBatch:
    return pack(list(samples), list(pixels), 2, arch.encoder.image_size, multiple)


def forward(layout: Layout, encoder: Path, head: Path, samples: list[Tokenized], pixels: Tensor) -> dict[str, Tensor]:
    """What this rank sees of a forward pass: encoder layers on the first stage, log-probs and logits on the last."""
    model = loaded_model(layout, encoder, head)
    batch = packed(model.arch, samples, pixels)
    seen: dict[str, Tensor] = {}
    if model.pre_process:
        _watch_encoder(model, layout, seen)
    if model.post_process:
        model.llm.decoder.register_forward_hook(lambda _m, _i, out: seen.__setitem__("hidden", out.detach()))

    def step(_iterator: Any, stage: VisionLanguageModel) -> tuple[Tensor, Any]:
        return stage(batch), lambda out, non_loss_data: seen.__setitem__("logprobs", out.detach())

    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=None,
            model=[model],
            num_microbatches=1,
            seq_length=1,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
        if model.post_process:
            seen["logits"] = _answer_logits(model, batch, seen.pop("hidden"))
    return seen


def encoder_pass(layout: Layout, encoder: Path, head: Path, pixels: Tensor, towards: Tensor | None) -> dict[str, Any]:
    """Where the encoder stands: its layers' outputs `[I, places, hidden]` and features `[I, tokens, hidden]`; with `towards`,
    of the features' shape, the gradients of their product and the weights, as Hugging Face tensors."""
    model = loaded_model(layout, encoder, head)
    arch = model.arch.encoder
    if not model.pre_process:
        return {}
    seen: dict[str, Tensor] = {}
    _watch_encoder(model, layout, seen)
    model.encoder.register_forward_hook(lambda _m, _i, out: seen.__setitem__("features", out))
    model.encoder(pixels)
    images, length = pixels.shape[0], pixels.shape[0] * arch.places
    layers = [seen[f"encoder.{i}"][:length].view(images, arch.places, -1) for i in range(model.arch.encoder_layers)]
    whole = seen["features"]
    if layout.sequence_parallel:
        whole = gather_from_sequence_parallel_region(whole, tensor_parallel_output_grad=False)
    features = whole[:length].view(images, arch.places, -1)[:, arch.places - arch.tokens :]
    if towards is None:
        return {"layers": layers, "features": features.detach()}
    (features * towards).sum().backward()
    weights = hf_tensors(model)
    group = parallel_state.get_tensor_model_parallel_group()
    for parameter in model.parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(gradient, group=group)
        parameter.data = gradient
    return {"weights": weights, "gradients": hf_tensors(model)}


def _watch_encoder(model: VisionLanguageModel, layout: Layout, seen: dict[str, Tensor]) -> None:
    def keep(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            whole = gather_from_sequence_parallel_region(hidden) if layout.sequence_parallel else hidden
            seen[name] = whole.detach().clone()

        return hook

    for i, layer in enumerate(model.encoder.decoder.layers):
        layer.register_forward_hook(keep(f"encoder.{i}"))


def _answer_logits(model: VisionLanguageModel, batch: PackedBatch, hidden: Tensor) -> Tensor:
    if model.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden)
    weight = model.llm.output_layer.weight
    weight = model.llm.shared_embedding_or_output_weight() if weight is None else weight
    whole: Tensor = gather_from_tensor_model_parallel_region(hidden[: batch.predictors.numel(), 0] @ weight.t())
    return whole[:, : model.arch.head.vocabulary]


def stage_of_rank() -> tuple[int, int]:
    return parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()


def run_config(
    layout: Layout, encoder: Path, head: Path, objective: Sft | Dpo, rules: tuple[ParameterRule, ...] = ()
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
        precision=Precision("fp32"),
        parameters=rules,
        seed=5,
    )


CLIP = 0.5

Shares = list[list[tuple[Any, ...]]]
"""For each data-parallel rank, its micro-batches: pairs, their images' pixels, and which image each place shows where it is not
one after another."""


def whole_gradients(wrapped: Any) -> None:
    """The distributed optimizer leaves each rank its own part of a reduced buffer: gather the parts, so that `main_grad`
    is whole."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    if group.size() == 1:
        return
    for buffer in wrapped.buffers:
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
) -> dict[str, Any]:
    """`steps` optimizer steps on the same batch: the first's gradients and the last's weights as Hugging Face tensors.

    `tile_bytes`: how much of the logits may stand at once. `cached`: the reference's log-probs come with the batches.
    """
    with unittest.mock.patch.object(vocabulary, "current_platform", lambda: in_tiles(tile_bytes)):
        return _train_steps(layout, encoder, head, shares, objective, steps, rules, recompute, cached)


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
) -> dict[str, Any]:
    config = run_config(layout, encoder, head, objective, rules)
    model = loaded_model(layout, encoder, head, recompute)
    judge = build_objective(objective)
    reference = loaded_model(layout, encoder, head).eval().requires_grad_(False) if judge.needs_reference else None
    apply_rules(model, config.parameters)
    wrapped = wrap(model, layout)
    optimization = build_optimization(wrapped, config, steps=10)
    own = shares[parallel_state.get_data_parallel_rank()]
    size = model.arch.encoder.image_size
    batches = [pack(samples, list(pixels), judge.branches, size, 4, *index) for samples, pixels, *index in own]
    if cached:
        assert reference is not None
        known = forward_logprobs(reference, batches)
        batches = [replace(batch, reference=logps) for batch, logps in zip(batches, known, strict=True)]
        reference = None
    gradients: dict[str, Tensor] = {}
    plain_step = optimization.optimizer.step

    def keep_gradients() -> Any:
        if not gradients:
            whole_gradients(wrapped)
            swapped = [(p, p.data, p.main_grad if p.requires_grad else torch.zeros_like(p)) for p in model.parameters()]
            for p, _, grad in swapped:
                p.data = grad.clone()
            gradients.update(hf_tensors(model))
            for p, data, _ in swapped:
                p.data = data
        return plain_step()

    optimization.optimizer.step = keep_gradients
    results = []
    for _ in range(steps):
        results.append(train_step(wrapped, optimization, judge, batches, reference))
        judge = observed(judge, results[-1])
    if layout.overlap_parameter_gather:
        wrapped.start_param_sync(force_sync=True)
    return {"gradients": gradients, "weights": hf_tensors(model), "results": results}


def round_trip(layout: Layout, encoder: Path, head: Path, swap_on_export: bool = False) -> dict[str, Tensor]:
    """What comes out of a model that was just loaded, by a table that may differ from the one it was loaded by."""
    from pivot_megatron.convert import gather
    from tests.parity.test_conversion import swap_query_and_key

    model = loaded_model(layout, encoder, head)
    if swap_on_export:
        table = {name: swap_query_and_key(row) for name, row in rows_by_parameter(model.arch).items()}
        with unittest.mock.patch.object(gather, "rows_by_parameter", lambda _arch: table):
            return hf_tensors(model)
    return hf_tensors(model)


def save_checkpoint(layout: Layout, encoder: Path, head: Path, out: Path) -> None:
    start = Model(encoder=Encoder(hf=encoder), llm=Component(hf=head))
    save_weights(loaded_model(layout, encoder, head), out, describe_start(start))


def loaded_checkpoint(layout: Layout, checkpoint: Path) -> dict[str, Tensor]:
    model = build_model(describe(checkpoint).architecture(), layout, Precision("fp32"), NOTHING_AGAIN)
    for component in COMPONENTS:
        load_weights(model, checkpoint, component)
    return hf_tensors(model)


def table_and_model(
    layout: Layout, encoder: Path, head: Path
) -> tuple[dict[str, int | None], dict[str, tuple[bool, int | None]]]:
    """The table's split and megatron-core's own marks, by parameter."""
    model = loaded_model(layout, encoder, head)
    rows = {name: row.transform.tp_dim for name, row in rows_by_parameter(model.arch).items()}
    marks = {
        name: (bool(getattr(p, "tensor_model_parallel", False)), getattr(p, "partition_dim", None))
        for name, p in parameters_by_global_name(model)
    }
    return rows, marks
