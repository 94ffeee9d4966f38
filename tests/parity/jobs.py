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
from pivot_megatron.convert.load import (
    FreshParts,
    hf_source,
    load_component,
    parameters_by_global_name,
)
from pivot_megatron.convert.plan import COMPONENTS, Slice, component_rows, part_shapes, rows_by_parameter
from pivot_megatron.convert.saving import save_weights
from pivot_megatron.convert.start import describe_start, start_weights
from pivot_megatron.convert.store import describe, load_weights
from pivot_megatron.data.batch import PackedBatch
from pivot_megatron.data.packing import pack
from pivot_megatron.data.tokens import Branch, Tokenized
from pivot_megatron.model import vocabulary
from pivot_megatron.model.composition import Architecture, Stage, VisionLanguageModel, build_model
from pivot_megatron.objective.build import build_objective
from pivot_megatron.runtime.device import Platform, current_platform
from pivot_megatron.train.optimizer import apply_rules, build_optimization, wrap
from pivot_megatron.train.step import forward_logprobs, observed, train_step
from tests.parity.images import Images, patches_of

NOTHING_AGAIN = Recompute()
FP32 = Precision("fp32")


def architecture(encoder: Path, head: Path, anyres: AnyRes | None = None) -> Architecture:
    return describe_start(Model(encoder=Encoder(hf=encoder), llm=Component(hf=head), anyres=anyres)).architecture()


def loaded_model(
    layout: Layout,
    encoder: Path,
    head: Path,
    recompute: Recompute = NOTHING_AGAIN,
    anyres: AnyRes | None = None,
    precision: Precision = FP32,
) -> Stage:
    arch = architecture(encoder, head, anyres)
    model = build_model(arch, layout, precision, recompute)
    load_component(model, "encoder", hf_source(arch, "encoder", encoder))
    load_component(model, "llm", hf_source(arch, "llm", head))
    load_component(model, "projector", FreshParts(part_shapes(arch, "projector"), seed=5))
    return model


def packed(samples: Sequence[Tokenized], pixels: Tensor, multiple: int = 4) -> PackedBatch:
    return pack(list(samples), one_by_one(pixels), 2, multiple)


def one_by_one(pixels: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    """Squares `[I, 3, S, S]` as `pack` takes images; those that are apart stay so."""
    return [pixels[i : i + 1] for i in range(len(pixels))] if isinstance(pixels, Tensor) else pixels


def forward(layout: Layout, encoder: Path, head: Path, samples: list[Tokenized], pixels: Tensor) -> dict[str, Tensor]:
    """What this rank sees of a forward pass: encoder layers on the first stage, log-probs and logits on the last."""
    stage = loaded_model(layout, encoder, head)
    batch = packed(samples, pixels)
    count = layout.micro_batch_multiple
    seen: dict[str, Tensor] = {}
    first, last = stage[0], stage[-1]
    if first.pre_process:
        _watch_encoder(first, layout, seen)
    if last.post_process:
        last.llm.decoder.register_forward_hook(lambda _m, _i, out: seen.__setitem__("hidden", out.detach()))

    def step(_iterator: Any, chunk: VisionLanguageModel) -> tuple[Tensor, Any]:
        return chunk(batch), lambda out, non_loss_data: seen.__setitem__("logprobs", out.detach())

    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[None] * len(stage),
            model=list(stage),
            num_microbatches=count,
            seq_length=1,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
        if last.post_process:
            seen["logits"] = _answer_logits(last, batch, seen.pop("hidden"))
    return seen


def encoder_pass(layout: Layout, encoder: Path, head: Path, images: Images, towards: Tensor | None) -> dict[str, Any]:
    """Where the encoder stands: its layers' outputs `[places, hidden]` and features `[tokens, hidden]`, image after image; with
    `towards`, of the features' shape, the gradients of their product and the weights, as Hugging Face tensors."""
    model = loaded_model(layout, encoder, head)
    arch = model.arch.encoder
    chunk = model[0]
    if not chunk.pre_process:  # gathering is collective
        return {} if towards is None else {"weights": hf_tensors(model), "gradients": hf_tensors(model)}
    seen: dict[str, Tensor] = {}
    _watch_encoder(chunk, layout, seen)
    chunk.encoder.register_forward_hook(lambda _m, _i, out: seen.__setitem__("features", out))
    chunk.encoder(torch.cat(images.pixels), [grid for view in images.views for grid in view.grids])
    length = images.places(arch)
    layers = [seen[f"encoder.{i}"][:length, 0] for i in range(model.arch.encoder_layers)]
    whole = seen["features"]
    if layout.sequence_parallel:
        whole = gather_from_sequence_parallel_region(whole, tensor_parallel_output_grad=False)
    features = patches_of(whole[:length, 0], arch)
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


CLIP = 0.5

Shares = list[list[tuple[Any, ...]]]
"""For each data-parallel rank, its micro-batches: pairs, their images' pixels, and which image each place shows where it is not
one after another."""


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


def _differing(model: Stage, component: str, folder: Path) -> list[str]:
    source, found = hf_source(model.arch, component, folder), hf_tensors(model)
    parts = [part for row in component_rows(model.arch, component) for part in row.hf]
    return [part for part in parts if not torch.equal(found[part], source.read(part, Slice()))]


def logprob_gradients(layout: Layout, encoder: Path, head: Path, samples: list[Tokenized]) -> dict[str, Tensor]:
    """Of the sum of all answers' log-probs, in one process."""
    model = loaded_model(layout, encoder, head)
    model.whole(pack(samples, [], 2, multiple=4)).sum().backward()
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return hf_tensors(model)


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


def save_checkpoint(layout: Layout, encoder: Path, head: Path, out: Path, anyres: AnyRes | None = None) -> None:
    start = Model(encoder=Encoder(hf=encoder), llm=Component(hf=head), anyres=anyres)
    save_weights(loaded_model(layout, encoder, head, anyres=anyres), out, describe_start(start))


def checkpoint_logprobs(layout: Layout, checkpoint: Path, batches: list[PackedBatch]) -> list[Tensor] | None:
    """Of each batch's targets, on the last stage."""
    model = build_model(describe(checkpoint).architecture(), layout, Precision("fp32"), NOTHING_AGAIN)
    for component in COMPONENTS:
        load_weights(model, checkpoint, component)
    found = forward_logprobs(model.eval(), batches)
    return [one for one in found if one is not None] or None


def loaded_checkpoint(layout: Layout, checkpoint: Path) -> dict[str, Tensor]:
    model = build_model(describe(checkpoint).architecture(), layout, Precision("fp32"), NOTHING_AGAIN)
    for component in COMPONENTS:
        load_weights(model, checkpoint, component)
    return hf_tensors(model)


def greedy(layout: Layout, checkpoint: Path, sample: Tokenized, pixels: list[Tensor], count: int) -> list[int]:
    """The likeliest next token after the sample's prefix, `count` times over."""
    model = build_model(describe(checkpoint).architecture(), layout, Precision("fp32"), NOTHING_AGAIN)
    for component in COMPONENTS:
        load_weights(model, checkpoint, component)
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
    model = build_model(describe_start(start).architecture(), layout, Precision("fp32"), NOTHING_AGAIN)
    start_weights(model, start, seed=5)
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
