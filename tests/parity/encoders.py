"""Small encoders of every family, as Hugging Face folders, and the libraries' own modules to compare with."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from pivot_megatron.convert.hf import chunk_of
from pivot_megatron.convert.reference import ReferenceEncoder, reference_encoder
from pivot_megatron.convert.tiny_checkpoints import make_encoder
from pivot_megatron.families.registry import ENCODERS
from pivot_megatron.families.table import spellings
from pivot_megatron.model.composition import Architecture
from tests.parity.images import Images, patches_of
from tests.parity.reference import ENCODER, IMAGE_SIZE, randomise

_SIZES = {
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": IMAGE_SIZE,
    "patch_size": 8,
}
_MEAN = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
# As the hub has them: the shortest edge, then a square from the middle.
_CROPPED = {
    "do_resize": True,
    "do_center_crop": True,
    "size": {"shortest_edge": IMAGE_SIZE},
    "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "resample": 3,
    **_MEAN,
}
_SQUARE = {"do_resize": True, "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}, "resample": 2, **_MEAN}


def _saved(folder: Path, model: PreTrainedModel, processor: dict[str, object], kind: str) -> None:
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({**processor, "image_processor_type": kind}))


def _siglip(folder: Path) -> None:
    make_encoder(folder, **ENCODER, seed=1)


def _clip(folder: Path) -> None:
    _saved(folder, CLIPVisionModel(CLIPVisionConfig(**_SIZES, intermediate_size=176)), _CROPPED, "CLIPImageProcessor")


def _dinov2(folder: Path) -> None:
    _saved(folder, Dinov2Model(Dinov2Config(**_SIZES, mlp_ratio=2)), _CROPPED, "BitImageProcessor")


def _dinov2_giant(folder: Path) -> None:
    _saved(folder, Dinov2Model(Dinov2Config(**_SIZES, use_swiglu_ffn=True)), _CROPPED, "BitImageProcessor")


def _dinov2_giant_padded(folder: Path) -> None:
    """Its width, 272, is what transformers rounds to a multiple of eight, and no multiple of 128."""
    config = Dinov2Config(**{**_SIZES, "hidden_size": 100}, use_swiglu_ffn=True)
    _saved(folder, Dinov2Model(config), _CROPPED, "BitImageProcessor")


def _vit(folder: Path) -> None:
    _saved(folder, ViTModel(ViTConfig(**_SIZES, intermediate_size=176)), _SQUARE, "ViTImageProcessor")


def _mae(folder: Path) -> None:
    _saved(folder, ViTMAEModel(ViTMAEConfig(**_SIZES, intermediate_size=176)), _SQUARE, "ViTImageProcessor")


def _moco(folder: Path) -> None:
    """A ViT of transformers, kept in `vit`, under timm's names."""
    config = ViTConfig(**_SIZES, intermediate_size=192, layer_norm_eps=1e-6)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder / "vit")
    randomise(folder / "vit", 3)
    tensors = as_timm(dict(_vit_of(folder).state_dict()))
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architecture": "vit_base_patch8_32",
                "num_classes": 0,
                "model_args": {"embed_dim": 96, "depth": 4, "num_heads": 4, "mlp_ratio": 2},
                "pretrained_cfg": {
                    "input_size": [3, IMAGE_SIZE, IMAGE_SIZE],
                    "interpolation": "bicubic",
                    "mean": _MEAN["image_mean"],
                    "std": _MEAN["image_std"],
                },
            }
        )
    )


def _vit_of(folder: Path) -> ViTModel:
    model: ViTModel = ViTModel.from_pretrained(folder / "vit", add_pooling_layer=False, attn_implementation="eager")
    return model


_TIMM = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "layernorm.": "norm.",
    "layers.": "blocks.",
    "attention.o_proj": "attn.proj",
}


def as_timm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of transformers' ViTModel under timm's names, query, key and value in one."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for theirs, timms in _TIMM.items():
            name = name.replace(theirs, timms)
        renamed[name] = tensor
    for kind in ("weight", "bias"):
        for name in [n for n in renamed if n.endswith(f"attention.q_proj.{kind}")]:
            stem = name.removesuffix(f"q_proj.{kind}")
            parts = [renamed.pop(f"{stem}{x}_proj.{kind}") for x in "qkv"]
            renamed[stem.replace("attention.", "attn.qkv.") + kind] = torch.cat(parts)
    return renamed


def _siglip2(folder: Path) -> None:
    config = Siglip2VisionConfig(
        **{n: v for n, v in _SIZES.items() if n != "image_size"}, intermediate_size=176, num_patches=16
    )
    processor = {"do_resize": True, "resample": 2, "patch_size": 8, "max_num_patches": 24, **_MEAN}
    _saved(folder, Siglip2VisionModel(config), processor, "Siglip2ImageProcessor")


MAKERS: dict[str, Callable[[Path], None]] = {
    "siglip": _siglip,
    "siglip2": _siglip2,
    "clip": _clip,
    "dinov2": _dinov2,
    "dinov2-giant": _dinov2_giant,
    "dinov2-giant-padded": _dinov2_giant_padded,
    "vit": _vit,
    "mae": _mae,
    "moco": _moco,
}


def make(name: str, folder: Path) -> Path:
    torch.manual_seed(1)
    MAKERS[name](folder)
    if name != "moco":
        randomise(folder, 3)
    return folder


class Library:
    """A folder's encoder in transformers: hidden states, features, and parameters under our tables' names."""

    def __init__(self, arch: Architecture, folder: Path) -> None:
        self.arch = arch
        self.family = arch.encoder.family
        self.model: Any = _vit_of(folder) if self.family == "moco" else reference_encoder(self.family, folder).model
        self._call = ReferenceEncoder(self.model, "vit" if self.family == "moco" else self.family)

    def layers(self, images: Images) -> tuple[list[Tensor], Tensor]:
        """Each layer's output `[places, hidden]`, image after image, and the normed last one."""
        found: list[Tensor] = []
        layers = next(m for m in self.model.modules() if isinstance(m, torch.nn.ModuleList))
        hooks = [
            layer.register_forward_hook(lambda _m, _i, out: found.append(out[0] if isinstance(out, tuple) else out))
            for layer in layers
        ]
        last = [self._call([one], [view.grids[0]])[0] for one, view in zip(images.pixels, images.views, strict=True)]
        for hook in hooks:
            hook.remove()
        count = len(layers)
        return [torch.cat([out[0] for out in found[i::count]]) for i in range(count)], torch.cat(last)

    def features(self, images: Images) -> Tensor:
        """`[tokens, hidden]`: of patches, where the recipe takes them."""
        layers, last = self.layers(images)
        states = last if self.arch.final_norm else layers[self.arch.encoder_layers - 1]
        return patches_of(states, self.arch.encoder)

    def named(self, tensors: Mapping[str, Tensor], part: str) -> Tensor:
        """Of the model's `tensors`, by the model's own names, the one that a table calls `part`."""
        name, chunk, chunks = chunk_of(part)
        if self.family == "moco":
            return as_timm(dict(tensors))[name].chunk(chunks)[chunk]
        family = ENCODERS[self.family]
        spelled = spellings(part, family.HF_PREFIX, family.ALIASES)
        return next(tensors[s] for s in spelled if s in tensors)
