"""SigLIP2 NaFlex vision encoders (`model_type: siglip2`): patches at an image's own aspect ratio.

SigLIP2 checkpoints of one resolution are `model_type: siglip`, and siglip.py's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pivot_megatron.errors import UserError
from pivot_megatron.families import siglip
from pivot_megatron.families.architecture import EncoderArchitecture
from pivot_megatron.families.table import Row
from pivot_megatron.families.vision import vision_table

MODEL_TYPES = ("siglip2_vision_model", "siglip2")
HF_CLASS = "Siglip2VisionModel"
HF_PREFIX = siglip.HF_PREFIX
ALIASES = siglip.ALIASES
LAYER_PREFIX = siglip.LAYER_PREFIX
ELSEWHERE = siglip.ELSEWHERE
PAST_FEATURES = siglip.PAST_FEATURES
NORM_PAST_FEATURES = siglip.NORM_PAST_FEATURES


def architecture(config: Mapping[str, Any], where: str) -> EncoderArchitecture:
    """From `config.json` of a vision model, or of a two-tower model with a `vision_config` inside."""
    vision = config.get("vision_config") or config
    positions, patch = vision.get("num_patches", 256), vision.get("patch_size", 16)
    if math.isqrt(positions) ** 2 != positions:
        raise UserError(f"{where}: num_patches: expected a square grid of positions, found {positions}")
    fixed = siglip.architecture({**vision, "image_size": math.isqrt(positions) * patch, "patch_size": patch}, where)
    return replace(fixed, family="siglip2", native=True)


def table(arch: EncoderArchitecture) -> tuple[Row, ...]:
    return vision_table(arch, siglip.NAMES)


def export_config(config: Mapping[str, Any], layers: int, whole: bool, image_size: int) -> dict[str, Any]:
    """`config.json` of an encoder with `layers` layers; `whole`: with everything past them that the original had."""
    exported = siglip.export_config(config, layers, whole, image_size)
    del exported["image_size"]  # it has none of its own
    return exported | {"architectures": [HF_CLASS], "model_type": MODEL_TYPES[0]}
