"""Which family reads which Hugging Face `model_type`."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch

from pivot_megatron.errors import UserError
from pivot_megatron.families import clip, dinov2, mae, moco, qwen2, qwen3, siglip, siglip2, vit
from pivot_megatron.families.architecture import EncoderArchitecture, HeadArchitecture, require_sound

ENCODERS: Mapping[str, ModuleType] = {
    "siglip": siglip,
    "siglip2": siglip2,
    "clip": clip,
    "dinov2": dinov2,
    "vit": vit,
    "mae": mae,
    "moco": moco,
}
HEADS: Mapping[str, ModuleType] = {"qwen2": qwen2, "qwen3": qwen3}


def _family(families: Mapping[str, ModuleType], config: Mapping[str, Any], kind: str, where: str) -> ModuleType:
    # timm's own config.json names an architecture and no model type.
    model_type = config.get("model_type") or ("timm_vit" if "architecture" in config else None)
    for family in families.values():
        if model_type in family.MODEL_TYPES:
            return family
    known = ", ".join(t for family in families.values() for t in family.MODEL_TYPES)
    raise UserError(f"{where}: model_type: expected a {kind} ({known}), found {model_type}")


def encoder_architecture(config: Mapping[str, Any], where: str) -> EncoderArchitecture:
    """`where` names the file in errors."""
    arch: EncoderArchitecture = _read(ENCODERS, config, "vision encoder", where)
    return arch


def head_architecture(config: Mapping[str, Any], where: str) -> HeadArchitecture:
    arch: HeadArchitecture = _read(HEADS, config, "language model", where)
    return arch


def _require_common(config: Mapping[str, Any], where: str) -> None:
    """What every family's config says in the same words. Raises UserError where it is what no family here can be."""
    part = config.get("vision_config") or config
    dtype, channels = part.get("dtype") or part.get("torch_dtype"), part.get("num_channels", 3)
    if dtype is not None and not isinstance(getattr(torch, str(dtype), None), torch.dtype):
        raise UserError(f"{where}: dtype: expected one of torch's, such as float32, found {dtype!r}")
    if channels != 3:
        raise UserError(f"{where}: num_channels: expected 3, red, green and blue, found {channels!r}")


def _read(families: Mapping[str, ModuleType], config: Mapping[str, Any], kind: str, where: str) -> Any:
    family = _family(families, config, kind, where)
    try:
        _require_common(config, where)
        arch = family.architecture(config, where)
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{where}: expected the numbers of a {kind}, found others ({error})") from None
    require_sound(arch, where)
    return arch
