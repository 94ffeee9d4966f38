"""The vision encoder: patch embedding, learned positions, transformer layers up to the feature layer."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import pad

from pivot_megatron.families.architecture import EncoderArchitecture
from pivot_megatron.model.attention import image_segments
from pivot_megatron.model.freeze import reaching
from pivot_megatron.model.specs import encoder_block


class VisionEncoder(MegatronModule):
    """Images `[I, 3, H, W]` to features `[places(/tp), 1, hidden]`, image after image, split over tensor-parallel ranks; an
    image's class token, where there is one, before its patches.

    All images run as one packed sequence, padded at its end to what ranks and FP8 divide by: 729 tokens an image
    divide by nothing useful, and padding inside an image would have to be masked.
    """

    def __init__(self, config: TransformerConfig, arch: EncoderArchitecture, final_norm: bool) -> None:
        """`final_norm`: the architecture has one and features are taken past it."""
        super().__init__(config=config)
        self.arch = arch
        self._multiple = config.tensor_model_parallel_size * (16 if config.fp8 else 1)
        dtype, width = config.params_dtype, arch.hidden
        self.patch_embedding = torch.nn.Conv2d(
            3, width, kernel_size=arch.patch_size, stride=arch.patch_size, bias=arch.patch_bias, dtype=dtype
        )
        self.position_embedding = torch.nn.Embedding(arch.places, width, dtype=dtype)
        self.position_embedding.weight.is_constant = arch.fixed_positions  # type: ignore[attr-defined]
        self.register_buffer("_places", torch.arange(arch.places), persistent=False)
        self.class_token = torch.nn.Parameter(torch.empty(width, dtype=dtype)) if arch.class_token else None
        self.pre_norm = torch.nn.LayerNorm(width, arch.norm_epsilon, dtype=dtype) if arch.pre_norm else None
        block = encoder_block(arch, config)
        self.decoder = TransformerBlock(config, block, pre_process=True, post_process=False)
        self.final_norm = block.layer_norm(config, width, eps=arch.norm_epsilon) if final_norm else None

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = self.embeddings(pixels)
        images, length, width = hidden.shape
        hidden = hidden.reshape(images * length, 1, width)
        hidden = pad(hidden, (0, 0, 0, 0, 0, -hidden.shape[0] % self._multiple))
        segments = image_segments(images, length, hidden.shape[0], hidden.device)
        if self.config.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden)
        hidden = reaching(hidden, self.decoder)
        out: Tensor = self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=segments)
        return out if self.final_norm is None else self.final_norm(out)

    def embeddings(self, pixels: Tensor) -> Tensor:
        """`[I, places, hidden]`."""
        patches = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            patches = torch.cat([self.class_token.expand(patches.shape[0], 1, -1), patches], dim=1)
        # Called as a module, so that a parameter gather that overlaps is waited for.
        hidden: Tensor = patches + self.position_embedding(self._places)
        return hidden if self.pre_norm is None else self.pre_norm(hidden)
