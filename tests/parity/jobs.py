"""What each process does in the parity tests. Top-level functions, so that processes can be sent them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

import pivot_megatron.runtime  # noqa: F401  (before megatron.core)
from pivot_megatron.config.schema import Layout, Precision, Recompute
from pivot_megatron.convert.load import FreshParts, hf_shapes, hf_source, load_component
from pivot_megatron.data.batch import PackedBatch
from pivot_megatron.data.packing import pack
from pivot_megatron.data.tokens import Tokenized
from pivot_megatron.families.registry import encoder_architecture, head_architecture
from pivot_megatron.model.composition import Architecture, VisionLanguageModel, build_model
from pivot_megatron.model.logprobs import vocabulary_logits


def architecture(encoder: Path, head: Path, feature_layer: int = -2) -> Architecture:
    def config(folder: Path) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((folder / "config.json").read_text())
        return loaded

    return Architecture(
        encoder_architecture(config(encoder), str(encoder)), head_architecture(config(head), str(head)), feature_layer
    )


def loaded_model(layout: Layout, encoder: Path, head: Path) -> VisionLanguageModel:
    arch = architecture(encoder, head)
    model = build_model(arch, layout, Precision("fp32"), Recompute())
    load_component(model, "encoder", hf_source(arch, "encoder", encoder))
    load_component(model, "llm", hf_source(arch, "llm", head))
    load_component(model, "projector", FreshParts(hf_shapes(model, "projector"), seed=5))
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


def _watch_encoder(model: VisionLanguageModel, layout: Layout, seen: dict[str, Tensor]) -> None:
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    def keep(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            whole = gather_from_sequence_parallel_region(hidden) if layout.sequence_parallel else hidden
            seen[name] = whole.detach().clone()

        return hook

    for i, layer in enumerate(model.encoder.decoder.layers):
        layer.register_forward_hook(keep(f"encoder.{i}"))


def _answer_logits(model: VisionLanguageModel, batch: PackedBatch, hidden: Tensor) -> Tensor:
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    if model.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden)
    local = vocabulary_logits(
        hidden[batch.predictors], model.llm.output_weight(), model.arch.head.vocabulary, model.config
    )
    whole: Tensor = gather_from_tensor_model_parallel_region(local)
    return whole[:, 0, : model.arch.head.vocabulary]


def stage_of_rank() -> tuple[int, int]:
    return parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()
