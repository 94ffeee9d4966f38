"""An encoder as plain transformers has it: what conversions are compared with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pivot_megatron.convert.hf import HfTensors, chunk_of, read_json
from pivot_megatron.errors import UserError
from pivot_megatron.families.registry import ENCODERS, encoder_architecture
from pivot_megatron.families.table import expand, spellings


@dataclass(frozen=True)
class ReferenceEncoder:
    """`model`: the library's own module, float32. `missing`: its tensors that the folder does not hold, by the module's names,
    which are then random.

    Called with images' pixels, each as PackedBatch has it, and their grids of patches, it gives their last hidden state
    `[images, places, hidden]`, normed where the model has a final norm; smaller images' places are padded at their end.
    """

    model: Any
    family: str
    missing: tuple[str, ...] = ()

    def __call__(self, pixels: Sequence[Tensor], grids: Sequence[tuple[int, int]]) -> Tensor:
        options: dict[str, Any] = {}
        device = pixels[0].device
        if self.family == "siglip2":
            images = pad_sequence(list(pixels), batch_first=True)
            places = torch.arange(images.shape[1], device=device)
            mask = places < torch.tensor([len(one) for one in pixels], device=device)[:, None]
            options = {
                "pixel_attention_mask": mask.int(),
                "spatial_shapes": torch.tensor(list(grids)),
            }
        else:
            images = torch.cat(list(pixels))
            elsewhere = images.shape[-1] != self.model.config.image_size
            if self.family == "mae":  # nothing masked, nothing shuffled
                tokens = grids[0][0] * grids[0][1]
                options["noise"] = torch.arange(tokens, dtype=torch.float32, device=device).expand(len(images), -1)
                options["interpolate_pos_encoding"] = elsewhere
            elif elsewhere and self.family != "dinov2":
                options["interpolate_pos_encoding"] = True
        hidden: Tensor = self.model(pixel_values=images, **options).last_hidden_state
        return hidden

    def layers(self, count: int) -> torch.nn.ModuleList | torch.nn.Sequential:
        """The model's `count` layers."""
        lists = (m for m in self.model.modules() if isinstance(m, torch.nn.ModuleList | torch.nn.Sequential))
        return next(m for m in lists if len(m) == count)


def reference_encoder(family: str, folder: Path, attention: str = "eager") -> ReferenceEncoder:
    """`attention`: which of the library's forms; `eager` is the plainest."""
    import transformers

    if family == "moco":
        return ReferenceEncoder(_vit_of_timm(folder, attention).eval(), family)
    options: dict[str, Any] = {"mask_ratio": 0.0} if family == "mae" else {}
    if family == "vit":
        options["add_pooling_layer"] = False
    cls = getattr(transformers, ENCODERS[family].HF_CLASS)
    options |= {"attn_implementation": attention, "output_loading_info": True}
    model, told = cls.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, **options)
    return ReferenceEncoder(model.eval(), family, tuple(sorted(told["missing_keys"])))


def lacking(family: str, config: Mapping[str, Any], parts: Iterable[str]) -> list[str]:
    """What the library's class, made from `config`, has beside `parts` (hub names), and so would draw at random."""
    if family == "moco":  # timm's, whose classifier is said to be none
        return []
    import transformers

    theirs = ENCODERS[family]
    try:
        with torch.device("meta"):
            names = getattr(transformers, theirs.HF_CLASS)(transformers.AutoConfig.for_model(**config)).state_dict()
    except Exception as error:  # the library checks values in its own ways
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the encoder's config.json: not a config that {theirs.HF_CLASS} reads ({first})") from None
    held = {spelled for part in parts for spelled in spellings(part, theirs.HF_PREFIX, theirs.ALIASES)}
    return [name for name in names if name not in held]


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


def _vit_of_timm(folder: Path, attention: str) -> Any:
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
    config._attn_implementation = attention
    model = ViTModel(config, add_pooling_layer=False)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model
