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
    """Images `[I, 3, H, W]` to features `[tokens(/tp), 1, hidden]`, image after image, split over tensor-parallel ranks.

    All images run as one packed sequence, padded at its end to what ranks and FP8 divide by: 729 tokens an image
    divide by nothing useful, and padding inside an image would have to be masked.
    """

    def __init__(self, config: TransformerConfig, arch: EncoderArchitecture) -> None:
        super().__init__(config=config)
        self.arch = arch
        self._multiple = config.tensor_model_parallel_size * (16 if config.fp8 else 1)
        dtype = config.params_dtype
        self.patch_embedding = torch.nn.Conv2d(
            3, arch.hidden, kernel_size=arch.patch_size, stride=arch.patch_size, dtype=dtype
        )
        self.position_embedding = torch.nn.Embedding(arch.tokens, arch.hidden, dtype=dtype)
        self.register_buffer("_places", torch.arange(arch.tokens), persistent=False)
        self.decoder = TransformerBlock(config, encoder_block(config.num_layers), pre_process=True, post_process=False)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype))
        # Called as a module, so that a parameter gather that overlaps is waited for.
        hidden = patches.flatten(2).transpose(1, 2) + self.position_embedding(self._places)
        images, length, width = hidden.shape
        hidden = hidden.reshape(images * length, 1, width)
        hidden = pad(hidden, (0, 0, 0, 0, 0, -hidden.shape[0] % self._multiple))
        segments = image_segments(images, length, hidden.shape[0], hidden.device)
        if self.config.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden)
        hidden = reaching(hidden, self.decoder)
        out: Tensor = self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=segments)
        return out
