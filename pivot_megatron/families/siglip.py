"""SigLIP and fixed-resolution SigLIP2 vision encoders (`model_type: siglip`, `siglip_vision_model`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pivot_megatron.errors import UserError
from pivot_megatron.families.architecture import EncoderArchitecture, field_of
from pivot_megatron.families.table import Copy, FuseQKV, Row

MODEL_TYPES = ("siglip_vision_model", "siglip")
HF_PREFIX = "vision_model."
# What the model has past the feature layer, never built here: an export drops these or puts them back unchanged.
PAST_FEATURES = ("vision_model.post_layernorm.", "vision_model.head.")
LAYER_PREFIX = "vision_model.encoder.layers."


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
        image_size=field_of(vision, "image_size", where),
        patch_size=field_of(vision, "patch_size", where),
        norm_epsilon=vision.get("layer_norm_eps", 1e-6),
        activation="gelu_tanh",
    )


def table(arch: EncoderArchitecture) -> tuple[Row, ...]:
    hf, ours = LAYER_PREFIX + "{layer}.", "decoder.layers.{layer}."
    rows = [
        Row("patch_embedding.weight", ("vision_model.embeddings.patch_embedding.weight",), Copy()),
        Row("patch_embedding.bias", ("vision_model.embeddings.patch_embedding.bias",), Copy()),
        Row("position_embedding.weight", ("vision_model.embeddings.position_embedding.weight",), Copy()),
        Row(ours + "self_attention.linear_proj.weight", (hf + "self_attn.out_proj.weight",), Copy(1)),
        Row(ours + "self_attention.linear_proj.bias", (hf + "self_attn.out_proj.bias",), Copy()),
        Row(ours + "mlp.linear_fc1.weight", (hf + "mlp.fc1.weight",), Copy(0)),
        Row(ours + "mlp.linear_fc1.bias", (hf + "mlp.fc1.bias",), Copy(0)),
        Row(ours + "mlp.linear_fc2.weight", (hf + "mlp.fc2.weight",), Copy(1)),
        Row(ours + "mlp.linear_fc2.bias", (hf + "mlp.fc2.bias",), Copy()),
    ]
    for kind in ("weight", "bias"):
        parts = tuple(f"{hf}self_attn.{x}_proj.{kind}" for x in "qkv")
        rows += [
            Row(f"{ours}input_layernorm.{kind}", (f"{hf}layer_norm1.{kind}",), Copy()),
            Row(f"{ours}pre_mlp_layernorm.{kind}", (f"{hf}layer_norm2.{kind}",), Copy()),
            Row(f"{ours}self_attention.linear_qkv.{kind}", parts, FuseQKV(1, arch.head_dim)),
        ]
    return tuple(rows)
