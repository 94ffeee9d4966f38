"""What each process does in the parity tests: loads a model and passes through it. Top-level functions, so that processes can be
sent them."""

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
from pivot_megatron.config.schema import AnyRes, Component, Encoder, Layout, Model, Precision, Recompute
from pivot_megatron.convert import gather
from pivot_megatron.convert.gather import hf_tensors
from pivot_megatron.convert.load import FreshParts, hf_source, load_component, parameters_by_global_name
from pivot_megatron.convert.plan import part_shapes, rows_by_parameter
from pivot_megatron.convert.start import describe_start
from pivot_megatron.data.batch import PackedBatch
from pivot_megatron.data.packing import pack
from pivot_megatron.data.tokens import Tokenized
from pivot_megatron.families.table import FuseQKV, Row
from pivot_megatron.model.composition import Architecture, Stage, VisionLanguageModel, build_model
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


def logprob_gradients(layout: Layout, encoder: Path, head: Path, samples: list[Tokenized]) -> dict[str, Tensor]:
    """Of the sum of all answers' log-probs, in one process."""
    model = loaded_model(layout, encoder, head)
    model.whole(pack(samples, [], 2, multiple=4)).sum().backward()
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return hf_tensors(model)


def round_trip(layout: Layout, encoder: Path, head: Path, swap_on_export: bool = False) -> dict[str, Tensor]:
    """What comes out of a model that was just loaded, by a table that may differ from the one it was loaded by."""
    model = loaded_model(layout, encoder, head)
    if swap_on_export:
        table = {name: swap_query_and_key(row) for name, row in rows_by_parameter(model.arch).items()}
        with unittest.mock.patch.object(gather, "rows_by_parameter", lambda _arch: table):
            return hf_tensors(model)
    return hf_tensors(model)


def swap_query_and_key(row: Row) -> Row:
    if isinstance(row.transform, FuseQKV):
        query, key, value = row.hf
        return replace(row, hf=(key, query, value))
    return row


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
