"""Qwen3's dense language models (`model_type: qwen3`): Qwen2's with norms on queries and keys, and no QKV bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pivot_megatron.errors import UserError
from pivot_megatron.families import qwen2
from pivot_megatron.families.architecture import HeadArchitecture
from pivot_megatron.families.table import Copy, Row

MODEL_TYPES = ("qwen3",)
HF_PREFIX, ALIASES, UNUSED = qwen2.HF_PREFIX, qwen2.ALIASES, qwen2.UNUSED


def architecture(config: Mapping[str, Any], where: str) -> HeadArchitecture:
    if config.get("attention_bias"):
        raise UserError(f"{where}: attention_bias: expected false for Qwen3, found true")
    # Its heads may be wider than hidden / heads, and are where the config does not say.
    arch = qwen2.architecture({"head_dim": 128, **config}, where)
    return replace(arch, family="qwen3", qkv_bias=False, qk_norm=True)


def table(arch: HeadArchitecture) -> tuple[Row, ...]:
    norms = (
        Row(
            f"decoder.layers.{{layer}}.self_attention.{x}_layernorm.weight",
            (f"model.layers.{{layer}}.self_attn.{x}_norm.weight",),
            Copy(),
        )
        for x in "qk"
    )
    return (*qwen2.table(arch), *norms)
