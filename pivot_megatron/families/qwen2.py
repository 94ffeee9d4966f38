"""Qwen2 and Qwen2.5 language models (`model_type: qwen2`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pivot_megatron.errors import UserError
from pivot_megatron.families.architecture import VOCABULARY_MULTIPLE, HeadArchitecture, field_of
from pivot_megatron.families.table import Copy, FuseGatedMLP, FuseQKV, Padding, Row

MODEL_TYPES = ("qwen2",)
HF_PREFIX = "model."
ALIASES: tuple[tuple[str, str], ...] = ()
# What a checkpoint may hold that no parameter is made of.
UNUSED = ("rotary_emb.inv_freq",)


def architecture(config: Mapping[str, Any], where: str) -> HeadArchitecture:
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default" or config.get("rope_scaling"):
        raise UserError(
            f"{where}: rope scaling: only plain rotary embeddings are supported, found {rope or 'rope_scaling'}"
        )
    if config.get("use_sliding_window"):
        raise UserError(f"{where}: use_sliding_window: full attention only is supported, found true")
    if others := set(config.get("layer_types") or ()) - {"full_attention"}:
        raise UserError(f"{where}: layer_types: full attention only is supported, found {', '.join(map(str, others))}")
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise UserError(f"{where}: hidden_act: expected silu, found {activation}")
    heads, hidden = field_of(config, "num_attention_heads", where), field_of(config, "hidden_size", where)
    return HeadArchitecture(
        family="qwen2",
        layers=field_of(config, "num_hidden_layers", where),
        hidden=hidden,
        heads=heads,
        groups=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        ffn=field_of(config, "intermediate_size", where),
        vocabulary=field_of(config, "vocab_size", where),
        norm_epsilon=config.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta") or field_of(config, "rope_theta", where)),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        max_positions=config.get("max_position_embeddings", 32768),
    )


def table(arch: HeadArchitecture) -> tuple[Row, ...]:
    hf, ours = "model.layers.{layer}.", "decoder.layers.{layer}."
    words = Copy(0, Padding.to_multiple(arch.vocabulary, VOCABULARY_MULTIPLE))
    rows = [
        Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), words),
        Row("decoder.final_layernorm.weight", ("model.norm.weight",), Copy()),
        Row(ours + "input_layernorm.weight", (hf + "input_layernorm.weight",), Copy()),
        Row(ours + "pre_mlp_layernorm.weight", (hf + "post_attention_layernorm.weight",), Copy()),
        Row(ours + "self_attention.linear_proj.weight", (hf + "self_attn.o_proj.weight",), Copy(1)),
        Row(ours + "mlp.linear_fc1.weight", (hf + "mlp.gate_proj.weight", hf + "mlp.up_proj.weight"), FuseGatedMLP()),
        Row(ours + "mlp.linear_fc2.weight", (hf + "mlp.down_proj.weight",), Copy(1)),
    ]
    for kind in ("weight", "bias") if arch.qkv_bias else ("weight",):
        parts = tuple(f"{hf}self_attn.{x}_proj.{kind}" for x in "qkv")
        fused = FuseQKV(arch.groups, arch.heads // arch.groups, arch.head_dim)
        rows.append(Row(f"{ours}self_attention.linear_qkv.{kind}", parts, fused))
    if not arch.tied_embeddings:
        rows.append(Row("output_layer.weight", ("lm_head.weight",), words))
    return tuple(rows)
