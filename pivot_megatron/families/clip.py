"""CLIP's vision encoders (`model_type: clip`, `clip_vision_model`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pivot_megatron.errors import UserError
from pivot_megatron.families import siglip
from pivot_megatron.families.architecture import EncoderArchitecture
from pivot_megatron.families.table import Row
from pivot_megatron.families.vision import vision_table

MODEL_TYPES = ("clip_vision_model", "clip")
HF_CLASS = "CLIPVisionModel"
HF_PREFIX = "vision_model."
ALIASES: tuple[tuple[str, str], ...] = ()
LAYER_PREFIX = "vision_model.encoder.layers."
ELSEWHERE = ("text_model.", "logit_scale", "text_projection.", "visual_projection.")
# What a checkpoint may hold past the features, without the prefix.
PAST_FEATURES = ("post_layernorm.", "embeddings.position_ids")
NORM_PAST_FEATURES = "vision_model.post_layernorm"
NAMES = replace(
    siglip.NAMES,
    class_token="vision_model.embeddings.class_embedding",
    pre_norm="vision_model.pre_layrnorm",  # as OpenAI spelled it
)
_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu"}


def architecture(config: Mapping[str, Any], where: str) -> EncoderArchitecture:
    """From `config.json` of a vision model, or of a two-tower model with a `vision_config` inside."""
    vision = config.get("vision_config") or config
    activation = vision.get("hidden_act", "quick_gelu")
    if activation not in _ACTIVATIONS:
        raise UserError(f"{where}: hidden_act: expected {' or '.join(_ACTIVATIONS)} for CLIP, found {activation}")
    return EncoderArchitecture(
        family="clip",
        layers=vision.get("num_hidden_layers", 12),
        hidden=vision.get("hidden_size", 768),
        heads=vision.get("num_attention_heads", 12),
        ffn=vision.get("intermediate_size", 3072),
        image_size=vision.get("image_size", 224),
        patch_size=vision.get("patch_size", 32),
        norm_epsilon=vision.get("layer_norm_eps", 1e-5),
        activation=_ACTIVATIONS[activation],
        feature_layer=-2,
        class_token=True,
        pre_norm=True,
        patch_bias=False,
    )


def table(arch: EncoderArchitecture) -> tuple[Row, ...]:
    return vision_table(arch, NAMES)


def export_config(config: Mapping[str, Any], layers: int, whole: bool, image_size: int) -> dict[str, Any]:
    """`config.json` of an encoder with `layers` layers. `whole` changes nothing: CLIP's class is whole either way."""
    vision = dict(config.get("vision_config") or config)
    return vision | {
        "architectures": [HF_CLASS],
        "model_type": "clip_vision_model",
        "num_hidden_layers": layers,
        "image_size": image_size,
    }
