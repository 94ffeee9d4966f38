"""MoCo-v3's ViT under timm's names: a `config.json` with timm's `architecture`, safetensors with `blocks.N.attn.qkv`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pivot_megatron.errors import UserError
from pivot_megatron.families.architecture import EncoderArchitecture, ratio_of
from pivot_megatron.families.table import Row
from pivot_megatron.families.vision import Names, vision_table

MODEL_TYPES = ("timm_vit",)
HF_CLASS = "timm"
# The first stands in the authors' own files.
HF_PREFIX = "module.base_encoder."
ALIASES: tuple[tuple[str, str], ...] = ()
LAYER_PREFIX = "blocks."
ELSEWHERE = ("head.", "fc_norm.", "module.momentum_encoder.", "module.predictor.")
# What a checkpoint may hold past the features, without the prefix.
PAST_FEATURES = ("norm.", "fc_norm.", "head.")
NORM_PAST_FEATURES = "norm"
NAMES = Names(
    patch="patch_embed.proj",
    position="pos_embed",
    class_token="cls_token",
    extra_dims=(1, 2),
    layer=LAYER_PREFIX + "{layer}.",
    norm1="norm1",
    qkv=("attn.qkv[0/3]", "attn.qkv[1/3]", "attn.qkv[2/3]"),
    out="attn.proj",
    norm2="norm2",
    fc1="mlp.fc1",
    fc2="mlp.fc2",
    final_norm="norm",
)
# hidden, layers, heads, of timm's `vit_<size>_patch<P>_<S>`; MoCo-v3's own small one has 12 heads and says so.
_SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}


_KNOWN = {"embed_dim", "depth", "num_heads", "mlp_ratio", "img_size", "patch_size", "num_classes"}


def architecture(config: Mapping[str, Any], where: str) -> EncoderArchitecture:
    """From timm's `config.json`; `model_args` there speak over what the architecture's name says."""
    name = config.get("architecture", "")
    found = re.fullmatch(r"vit_(\w+?)_patch(\d+)_(\d+)", name)
    if found is None or found[1] not in _SIZES:
        raise UserError(
            f"{where}: architecture: expected timm's vit_{{{','.join(_SIZES)}}}_patchP_S, found {name or 'none'}"
        )
    hidden, layers, heads = _SIZES[found[1]]
    said = config.get("model_args") or {}
    if unknown := said.keys() - _KNOWN:
        raise UserError(
            f"{where}: model_args: expected {', '.join(sorted(_KNOWN))}, found {', '.join(sorted(unknown))}"
        )
    _require_processor(config.get("pretrained_cfg", {}), where)
    hidden = said.get("embed_dim", hidden)
    return EncoderArchitecture(
        family="moco",
        layers=said.get("depth", layers),
        hidden=hidden,
        heads=said.get("num_heads", heads),
        ffn=int(hidden * ratio_of(said, "mlp_ratio", 4, f"{where}: model_args")),
        image_size=said.get("img_size", int(found[3])),
        patch_size=said.get("patch_size", int(found[2])),
        norm_epsilon=1e-6,
        activation="gelu",
        feature_layer=-1,
        class_token=True,
        final_norm=True,
        fixed_positions=True,
    )


def _require_processor(config: Any, where: str) -> None:
    """timm's image processor stands in the same file."""
    size = config.get("input_size", [3, 1, 1]) if isinstance(config, dict) else None
    if not isinstance(size, list) or len(size) != 3 or size[0] != 3:
        raise UserError(f"{where}: pretrained_cfg: expected an input_size [3, height, width], found {size or config!r}")


def table(arch: EncoderArchitecture) -> tuple[Row, ...]:
    return vision_table(arch, NAMES)


def export_config(config: Mapping[str, Any], layers: int, whole: bool, image_size: int) -> dict[str, Any]:
    """timm's `config.json` of an encoder with `layers` layers and no classifier."""
    said = {**(config.get("model_args") or {}), "depth": layers, "num_classes": 0, "img_size": image_size}
    exported = {**config, "num_classes": 0, "model_args": said}
    if "pretrained_cfg" in config:
        exported["pretrained_cfg"] = {**config["pretrained_cfg"], "input_size": [3, image_size, image_size]}
    return exported
