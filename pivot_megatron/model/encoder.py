"""The vision encoder: patch embedding, positions, transformer layers up to the feature layer."""

from __future__ import annotations

from collections.abc import Sequence

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
from pivot_megatron.model.native import native_positions
from pivot_megatron.model.specs import encoder_block
from pivot_megatron.runtime.fp8 import token_multiple


class VisionEncoder(MegatronModule):
    """Images as PackedBatch's `pixels` have them to features `[places(/tp), 1, hidden]`, image after image, split over
    tensor-parallel ranks; an image's class token, where there is one, before its patches.

    All images run as one packed sequence, padded at its end to what ranks and FP8 divide by: 729 tokens an image
    divide by nothing useful, and padding inside an image would have to be masked.
    """

    def __init__(self, config: TransformerConfig, arch: EncoderArchitecture, final_norm: bool) -> None:
        """`final_norm`: the architecture has one and features are taken past it."""
        super().__init__(config=config)
        self.arch = arch
        self._multiple = config.tensor_model_parallel_size * token_multiple(config.fp8_recipe if config.fp8 else None)
        dtype, width = config.params_dtype, arch.hidden
        edge = arch.patch_size
        self.patch_embedding: torch.nn.Module = (
            torch.nn.Linear(3 * edge**2, width, bias=arch.patch_bias, dtype=dtype)
            if arch.native
            else torch.nn.Conv2d(3, width, kernel_size=edge, stride=edge, bias=arch.patch_bias, dtype=dtype)
        )
        self.position_embedding = torch.nn.Embedding(arch.places, width, dtype=dtype)
        self.position_embedding.weight.is_constant = arch.fixed_positions  # type: ignore[attr-defined]
        self.register_buffer("_places", torch.arange(arch.places), persistent=False)
        self.class_token = torch.nn.Parameter(torch.empty(width, dtype=dtype)) if arch.class_token else None
        self.pre_norm = torch.nn.LayerNorm(width, arch.norm_epsilon, dtype=dtype) if arch.pre_norm else None
        block = encoder_block(arch, config)
        self.decoder = TransformerBlock(config, block, pre_process=True, post_process=False)
        self.final_norm = block.layer_norm(config, width, eps=arch.norm_epsilon) if final_norm else None

    def forward(self, pixels: Tensor, grids: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """`grids`: patches down and across of each image; left out, all are squares of the encoder's own size."""
        grids = [(self.arch.grid, self.arch.grid)] * pixels.shape[0] if grids is None else grids
        hidden = self.embeddings(pixels, grids)[:, None]
        hidden = pad(hidden, (0, 0, 0, 0, 0, -hidden.shape[0] % self._multiple))
        lengths = [int(self.arch.class_token) + rows * columns for rows, columns in grids]
        segments = image_segments(lengths, hidden.shape[0], hidden.device)
        if self.config.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden)
        hidden = reaching(hidden, self.decoder)
        out: Tensor = self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=segments)
        return out if self.final_norm is None else self.final_norm(out)

    def embeddings(self, pixels: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """`[places, hidden]`."""
        patches: Tensor = self.patch_embedding(pixels.to(self.config.params_dtype))
        # Called as a module, so that a parameter gather that overlaps is waited for.
        positions = self.position_embedding(self._places)
        if self.arch.native:
            return patches + native_positions(positions, grids)
        patches = patches.flatten(2).transpose(1, 2)
        if self.class_token is not None:
            patches = torch.cat([self.class_token.expand(patches.shape[0], 1, -1), patches], dim=1)
        hidden: Tensor = (patches + positions).flatten(0, 1)
        return hidden if self.pre_norm is None else self.pre_norm(hidden)
