"""MAE's encoder (`model_type: vit_mae`): a ViT whose sine-cosine positions are not learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pivot_megatron.families import vit
from pivot_megatron.families.architecture import EncoderArchitecture
from pivot_megatron.families.table import Row

MODEL_TYPES = ("vit_mae",)
HF_CLASS = "ViTMAEModel"
HF_PREFIX, ALIASES, LAYER_PREFIX = vit.HF_PREFIX, vit.ALIASES, vit.LAYER_PREFIX
ELSEWHERE = ("decoder.",)
PAST_FEATURES = vit.PAST_FEATURES
NORM_PAST_FEATURES = vit.NORM_PAST_FEATURES


def architecture(config: Mapping[str, Any], where: str) -> EncoderArchitecture:
    return replace(vit.architecture(config, where, family="mae"), fixed_positions=True)


def table(arch: EncoderArchitecture) -> tuple[Row, ...]:
    return vit.table(arch)


def export_config(config: Mapping[str, Any], layers: int, whole: bool, image_size: int) -> dict[str, Any]:
    return {**config, "architectures": [HF_CLASS], "num_hidden_layers": layers, "image_size": image_size}
