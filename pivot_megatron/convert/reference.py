"""An encoder as plain transformers has it: what conversions are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pivot_megatron.convert.hf import HfTensors, chunk_of, read_json
from pivot_megatron.families.registry import ENCODERS, encoder_architecture
from pivot_megatron.families.table import expand


@dataclass(frozen=True)
class ReferenceEncoder:
    """`model`: the library's own module, float32. Called with one image's pixels as PackedBatch has them, of `grid` patches, it
    gives its last hidden state, normed where the model has a final norm."""

    model: Any
    family: str

    def __call__(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        options: dict[str, Any] = {}
        if self.family == "siglip2":
            mask = torch.ones(1, pixels.shape[0], dtype=torch.int32)
            options = {"pixel_attention_mask": mask, "spatial_shapes": torch.tensor([grid])}
            pixels = pixels[None]
        elif self.family == "mae":  # nothing masked, nothing shuffled
            tokens = grid[0] * grid[1]
            options["noise"] = torch.arange(tokens, dtype=torch.float32)[None]
            options["interpolate_pos_encoding"] = pixels.shape[-1] != self.model.config.image_size
        elif pixels.shape[-1] != self.model.config.image_size and self.family != "dinov2":
            options["interpolate_pos_encoding"] = True
        hidden: Tensor = self.model(pixel_values=pixels, **options).last_hidden_state
        return hidden


def reference_encoder(family: str, folder: Path) -> ReferenceEncoder:
    import transformers

    if family == "moco":
        return ReferenceEncoder(_vit_of_timm(folder).eval(), family)
    options: dict[str, Any] = {"mask_ratio": 0.0} if family == "mae" else {}
    if family == "vit":
        options["add_pooling_layer"] = False
    cls = getattr(transformers, ENCODERS[family].HF_CLASS)
    model = cls.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **options)
    return ReferenceEncoder(model.eval(), family)


# timm's names and those of transformers' ViT, in the order in which they are replaced.
_TIMM = (
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    ("norm1", "layernorm_before"),
    ("norm2", "layernorm_after"),
    ("attn.proj", "attention.o_proj"),
    ("blocks.", "layers."),
)


def _vit_of_timm(folder: Path) -> Any:
    """The same network in transformers, whose ViT keeps query, key and value apart."""
    from transformers import ViTConfig, ViTModel

    where = folder / "config.json"
    arch = encoder_architecture(read_json(where), str(where))
    tensors = HfTensors(folder, lambda name: [name, ENCODERS["moco"].HF_PREFIX + name])
    state: dict[str, Tensor] = {}
    for part in (part for row in expand(ENCODERS["moco"].table(arch), arch.layers) for part in row.hf):
        name, chunk, _ = chunk_of(part)
        for timms, theirs in _TIMM:
            name = name.replace(timms, theirs)
        name = name.replace("attn.qkv", f"attention.{'qkv'[chunk]}_proj")
        state["layernorm" + name.removeprefix("norm") if name.startswith("norm.") else name] = tensors.read(part)
    config = ViTConfig(
        hidden_size=arch.hidden,
        num_hidden_layers=arch.layers,
        num_attention_heads=arch.heads,
        intermediate_size=arch.ffn,
        image_size=arch.image_size,
        patch_size=arch.patch_size,
        layer_norm_eps=arch.norm_epsilon,
    )
    config._attn_implementation = "eager"
    model = ViTModel(config, add_pooling_layer=False)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model
