"""Supervised ViT and MAE (`model_type: vit`, `vit_mae`): one encoder, under one set of names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pivot_megatron.errors import UserError
from pivot_megatron.families.architecture import EncoderArchitecture
from pivot_megatron.families.table import Row
from pivot_megatron.families.vision import Names, vision_table

MODEL_TYPES = ("vit",)
HF_CLASS = "ViTModel"
HF_PREFIX = "vit."
# Files have the first spelling; modules of transformers 5 have the second, and so have files saved as they stand there.
ALIASES = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
    ("encoder.layer.", "layers."),
)
LAYER_PREFIX = "encoder.layer."
ELSEWHERE = ("classifier.",)
# What a checkpoint may hold past the features, without the prefix.
PAST_FEATURES = ("layernorm.", "pooler.", "embeddings.mask_token")
NORM_PAST_FEATURES = "layernorm"
NAMES = Names(
    patch="embeddings.patch_embeddings.projection",
    position="embeddings.position_embeddings",
    class_token="embeddings.cls_token",
    extra_dims=(1, 2),
    layer=LAYER_PREFIX + "{layer}.",
    norm1="layernorm_before",
    qkv=("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    out="attention.output.dense",
    norm2="layernorm_after",
    fc1="intermediate.dense",
    fc2="output.dense",
    final_norm="layernorm",
)


def architecture(config: Mapping[str, Any], where: str, family: str = "vit") -> EncoderArchitecture:
    activation = config.get("hidden_act", "gelu")
    if activation != "gelu":
        raise UserError(f"{where}: hidden_act: expected gelu for a ViT, found {activation}")
    return EncoderArchitecture(
        family=family,
        layers=config.get("num_hidden_layers", 12),
        hidden=config.get("hidden_size", 768),
        heads=config.get("num_attention_heads", 12),
        ffn=config.get("intermediate_size", 3072),
        image_size=config.get("image_size", 224),
        patch_size=config.get("patch_size", 16),
        norm_epsilon=config.get("layer_norm_eps", 1e-12),
        activation="gelu",
        feature_layer=-1,
        class_token=True,
        final_norm=True,
        qkv_bias=config.get("qkv_bias", True),
    )


def table(arch: EncoderArchitecture) -> tuple[Row, ...]:
    return vision_table(arch, NAMES)


def export_config(config: Mapping[str, Any], layers: int, whole: bool, image_size: int) -> dict[str, Any]:
    """`config.json` of an encoder with `layers` layers. The pooler, where there is one, is no matter of the config."""
    return {**config, "architectures": [HF_CLASS], "num_hidden_layers": layers, "image_size": image_size}
