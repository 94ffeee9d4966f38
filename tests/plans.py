"""Architectures that plans are tested on: published sizes, and small ones that every layout of `matrix` can cut."""

from __future__ import annotations

from typing import Any

from pivot_megatron.families.registry import encoder_architecture, head_architecture
from pivot_megatron.model.composition import Architecture
from pivot_megatron.plan.hardware import published_configs
from pivot_megatron.plan.machine import Link, Links

SO400M = published_configs("encoders")["siglip2-so400m-patch16-384"]
HEADS = {size: published_configs("heads")[f"qwen2.5-{size.lower()}"] for size in ("0.5B", "1.5B", "7B", "72B")}
MAE_BASE: dict[str, Any] = {
    "model_type": "vit_mae",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu",
}


def qwen2(hidden: int, ffn: int, layers: int, heads: int, groups: int, vocabulary: int, tied: bool) -> dict[str, Any]:
    """A head's config.json, with the key names of Qwen2.5's."""
    return {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
    }


def model(encoder: dict[str, Any], head: dict[str, Any]) -> Architecture:
    """Features are taken where SigLIP's are: of the last layer but one."""
    return Architecture(encoder_architecture(encoder, "encoder"), head_architecture(head, "head"), -2)


_SMALL = SO400M | {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
TINY = model(_SMALL, qwen2(64, 96, 4, 4, 2, 300, tied=True))
TINY_UNTIED = model(_SMALL, qwen2(64, 96, 4, 4, 2, 300, tied=False))


def alike(link: Link) -> Links:
    return Links(link, link, link, link)
