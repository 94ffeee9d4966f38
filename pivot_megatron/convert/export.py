"""Trained tensors as Hugging Face folders: the encoder alone, or the assembled LLaVA model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pivot_megatron.convert.hf import PROCESSOR, HfTensors, read_json
from pivot_megatron.convert.plan import component_rows
from pivot_megatron.convert.store import Description
from pivot_megatron.data.chat import QWEN_1_5_JINJA
from pivot_megatron.errors import UserError
from pivot_megatron.families import siglip
from pivot_megatron.model.composition import Architecture

Export = tuple[dict[str, Any], dict[str, Tensor]]
"""config.json and tensors."""


def stored_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that a `config.json` says its tensors have."""
    name = config.get("dtype") or config.get("torch_dtype")
    return getattr(torch, name) if isinstance(name, str) else None


def _component(
    arch: Architecture, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    dtype = stored_dtype(config)
    names = [part for row in component_rows(arch, name) for part in row.hf]
    return {part: tensors[part].to(dtype) if dtype else tensors[part] for part in names}


def _vision_config(description: Description, layers: int, use_head: bool) -> dict[str, Any]:
    from transformers import SiglipVisionConfig

    stored = read_json(description.encoder / "config.json")
    config: dict[str, Any] = SiglipVisionConfig(**(stored.get("vision_config") or stored)).to_dict()
    config |= {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        "num_hidden_layers": layers,
        "vision_use_head": use_head,
    }
    if dtype := stored_dtype(stored):
        config["dtype"] = str(dtype).removeprefix("torch.")
    return config


def export_encoder(
    description: Description,
    tensors: Mapping[str, Tensor],
    last_layer: Literal["drop", "original"],
    original: HfTensors | None,
    trained_dtype: torch.dtype = torch.float32,
) -> Export:
    """The vision encoder under hub key names, in the dtype of the checkpoint it came from.

    `drop`: the layers up to the feature layer, no pooling head; features are `hidden_states[-1]`. Its post-layernorm, which
    transformers always has and nothing trained, is the identity scale. `original`: what stands past the feature layer comes
    from `original` unchanged, and so does every tensor that did not train: features are `hidden_states` at the same index
    as before.
    `trained_dtype`: in which the run held its weights; a tensor that is still the original rounded to it did not train.
    """
    arch = description.architecture()
    stored = read_json(description.encoder / "config.json")
    trained = _component(arch, "encoder", tensors, stored)
    if last_layer == "drop":
        hidden = arch.encoder.hidden
        dtype = next(iter(trained.values())).dtype
        trained["vision_model.post_layernorm.weight"] = torch.ones(hidden, dtype=dtype)
        trained["vision_model.post_layernorm.bias"] = torch.zeros(hidden, dtype=dtype)
        return _vision_config(description, arch.encoder_layers, use_head=False), trained
    if original is None:
        raise UserError("--last-layer original: needs --original, the encoder folder that the run started from")
    whole: dict[str, Tensor] = {}
    for stored_name in original.names():
        name = siglip.HF_PREFIX + stored_name.removeprefix(siglip.HF_PREFIX)
        if stored_name.startswith(("text_model.", "logit_")):
            continue  # the text tower of a two-tower checkpoint
        whole[name] = original.read(stored_name)
    if missing := [name for name in trained if name not in whole]:
        raise UserError(f"{original.folder}: expected the encoder that the run started from, found no {missing[0]}")
    for name, tensor in trained.items():
        whole[name] = as_stored(tensor, whole[name], trained_dtype)
    use_head = any(name.startswith("vision_model.head.") for name in whole)
    return _vision_config(description, arch.encoder.layers, use_head), whole


def as_stored(trained: Tensor, original: Tensor, trained_dtype: torch.dtype) -> Tensor:
    """`trained` in the original's dtype; the original's own bits where training in `trained_dtype` left it as it was."""
    unchanged = torch.equal(original.to(trained_dtype), trained.to(trained_dtype))
    return original if unchanged else trained.to(original.dtype)


_LLAVA_NAMES = {
    "vision_model.": "vision_tower.vision_model.",
    "multi_modal_projector.": "multi_modal_projector.",
    "model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}


def _llava_name(name: str) -> str:
    for prefix, replacement in _LLAVA_NAMES.items():
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    raise ValueError(f"no LLaVA name for {name}")


def export_mllm(description: Description, tensors: Mapping[str, Tensor], image_token: int) -> Export:
    """Encoder (up to the feature layer), projector and head as `LlavaForConditionalGeneration`, under its hub key names."""
    from transformers import LlavaConfig, Qwen2Config, SiglipVisionConfig

    arch = description.architecture()
    text = read_json(description.llm / "config.json")
    encoder_config, encoder = export_encoder(description, tensors, "drop", None)
    parts = {
        **encoder,
        **_component(arch, "projector", tensors, text),
        **_component(arch, "llm", tensors, text),
    }
    config: dict[str, Any] = LlavaConfig(
        vision_config=SiglipVisionConfig(**encoder_config),
        text_config=Qwen2Config(**text),
        image_token_index=image_token,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=arch.encoder.tokens,
        tie_word_embeddings=arch.head.tied_embeddings,
        architectures=["LlavaForConditionalGeneration"],
    ).to_dict()
    return config, {_llava_name(name): tensor for name, tensor in parts.items()}


def image_token_and_processor(description: Description, out: Path) -> int:
    """Save tokenizer and processor with an `<image>` token of its own to `out`; returns the token's id.

    The token takes the first free id, which the embedding must already have a row for.
    """
    from transformers import AutoImageProcessor, AutoTokenizer, LlavaProcessor

    arch = description.architecture()
    tokenizer = AutoTokenizer.from_pretrained(description.llm, local_files_only=True)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    token: int = tokenizer.convert_tokens_to_ids("<image>")  # type: ignore[assignment]
    if token >= arch.head.vocabulary:
        raise UserError(
            f"{description.llm}: the tokenizer uses all {arch.head.vocabulary} rows of the embedding, so no id is free for "
            "<image>; add a row to the head before training"
        )
    if description.template != "tokenizer":
        tokenizer.chat_template = QWEN_1_5_JINJA  # Qwen2.5's own would put another system prompt in front
    processor = LlavaProcessor(
        image_processor=AutoImageProcessor.from_pretrained(description.encoder, local_files_only=True),
        tokenizer=tokenizer,
        patch_size=arch.encoder.patch_size,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token="<image>",
        chat_template=tokenizer.chat_template,
    )
    processor.save_pretrained(out)
    return token


def encoder_files(description: Description) -> list[Path]:
    """Files that go with an encoder unchanged."""
    processor = description.encoder / PROCESSOR
    return [processor] if processor.exists() else []
