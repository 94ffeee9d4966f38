"""SigLIP and fixed-resolution SigLIP2 vision encoders (`model_type: siglip`, `siglip_vision_model`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pivot_megatron.errors import UserError
from pivot_megatron.families.architecture import EncoderArchitecture
from pivot_megatron.families.table import Row
from pivot_megatron.families.vision import Names, vision_table

MODEL_TYPES = ("siglip_vision_model", "siglip")
HF_CLASS = "SiglipVisionModel"
HF_PREFIX = "vision_model."
ALIASES: tuple[tuple[str, str], ...] = ()
LAYER_PREFIX = "vision_model.encoder.layers."
ELSEWHERE = ("text_model.", "logit_")
# What a checkpoint may hold past the features, without the prefix.
PAST_FEATURES = ("post_layernorm.", "head.", "embeddings.position_ids")
NORM_PAST_FEATURES = "vision_model.post_layernorm"
NAMES = Names(
    patch="vision_model.embeddings.patch_embedding",
    position="vision_model.embeddings.position_embedding.weight",
    layer=LAYER_PREFIX + "{layer}.",
    norm1="layer_norm1",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.out_proj",
    norm2="layer_norm2",
    fc1="mlp.fc1",
    fc2="mlp.fc2",
)


def architecture(config: Mapping[str, Any], where: str) -> EncoderArchitecture:
    """From `config.json` of a vision model, or of a two-tower model with a `vision_config` inside."""
    vision = config.get("vision_config") or config
    activation = vision.get("hidden_act", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise UserError(f"{where}: hidden_act: expected gelu_pytorch_tanh for SigLIP, found {activation}")
    return EncoderArchitecture(
        family="siglip",
        layers=vision.get("num_hidden_layers", 12),
        hidden=vision.get("hidden_size", 768),
        heads=vision.get("num_attention_heads", 12),
        ffn=vision.get("intermediate_size", 3072),
        image_size=vision.get("image_size", 224),
        patch_size=vision.get("patch_size", 16),
        norm_epsilon=vision.get("layer_norm_eps", 1e-6),
        activation="gelu_tanh",
        feature_layer=-2,
    )


def table(arch: EncoderArchitecture) -> tuple[Row, ...]:
    return vision_table(arch, NAMES)


def export_config(config: Mapping[str, Any], layers: int, whole: bool, image_size: int) -> dict[str, Any]:
    """`config.json` of an encoder with `layers` layers; `whole`: with everything past them that the original had."""
    vision = dict(config.get("vision_config") or config)
    return vision | {
        "architectures": [HF_CLASS],
        "model_type": "siglip_vision_model",
        "num_hidden_layers": layers,
        "image_size": image_size,
        "vision_use_head": whole and vision.get("vision_use_head", True),
    }
