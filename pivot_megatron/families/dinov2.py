"""DINOv2 (`model_type: dinov2`): LayerScale, and SwiGLU in the giant one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pivot_megatron.errors import UserError
from pivot_megatron.families.architecture import EncoderArchitecture, ratio_of
from pivot_megatron.families.table import Row
from pivot_megatron.families.vision import Names, vision_table

MODEL_TYPES = ("dinov2",)
HF_CLASS = "Dinov2Model"
HF_PREFIX = "dinov2."
# Files have the first spelling; modules of transformers 5 have the second, and so have files saved as they stand there.
ALIASES = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("mlp.weights_in.weight[0/2]", "mlp.gate_proj.weight"),
    ("mlp.weights_in.weight[1/2]", "mlp.up_proj.weight"),
    ("mlp.weights_in.bias[0/2]", "mlp.gate_proj.bias"),
    ("mlp.weights_in.bias[1/2]", "mlp.up_proj.bias"),
    ("mlp.weights_out", "mlp.down_proj"),
)
LAYER_PREFIX = "encoder.layer."
ELSEWHERE = ("classifier.",)
# What a checkpoint may hold past the features, without the prefix.
PAST_FEATURES = ("layernorm.", "embeddings.mask_token")
NORM_PAST_FEATURES = "layernorm"


def architecture(config: Mapping[str, Any], where: str) -> EncoderArchitecture:
    activation, gated = config.get("hidden_act", "gelu"), config.get("use_swiglu_ffn", False)
    if activation != "gelu":
        raise UserError(f"{where}: hidden_act: expected gelu for DINOv2, found {activation}")
    hidden = config.get("hidden_size", 768)
    ffn = int(hidden * ratio_of(config, "mlp_ratio", 4, where))
    return EncoderArchitecture(
        family="dinov2",
        layers=config.get("num_hidden_layers", 12),
        hidden=hidden,
        heads=config.get("num_attention_heads", 12),
        # SwiGLU has two thirds of the width, rounded up to a multiple of eight.
        ffn=(int(ffn * 2 / 3) + 7) // 8 * 8 if gated else ffn,
        image_size=config.get("image_size", 224),
        patch_size=config.get("patch_size", 14),
        norm_epsilon=config.get("layer_norm_eps", 1e-6),
        activation="swiglu" if gated else "gelu",
        feature_layer=-1,
        class_token=True,
        final_norm=True,
        qkv_bias=config.get("qkv_bias", True),
        layer_scale=True,
    )


def table(arch: EncoderArchitecture) -> tuple[Row, ...]:
    names = Names(
        patch="embeddings.patch_embeddings.projection",
        position="embeddings.position_embeddings",
        class_token="embeddings.cls_token",
        extra_dims=(1, 2),
        layer=LAYER_PREFIX + "{layer}.",
        norm1="norm1",
        qkv=("attention.attention.query", "attention.attention.key", "attention.attention.value"),
        out="attention.output.dense",
        scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
        norm2="norm2",
        fc1="mlp.fc1",
        fc2="mlp.weights_out" if arch.gated else "mlp.fc2",
        gate_and_up=("mlp.weights_in[0/2]", "mlp.weights_in[1/2]"),
        final_norm="layernorm",
    )
    return vision_table(arch, names)


def export_config(config: Mapping[str, Any], layers: int, whole: bool, image_size: int) -> dict[str, Any]:
    """`config.json` of an encoder with `layers` layers; `whole`: with the original's mask token."""
    return {
        **config,
        "architectures": [HF_CLASS],
        "num_hidden_layers": layers,
        "image_size": image_size,
        "use_mask_token": whole and config.get("use_mask_token", True),
    }
