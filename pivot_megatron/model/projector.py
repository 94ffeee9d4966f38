"""From the encoder's patches to tokens of the language model: two linears, and what joins tiles into one image."""

from __future__ import annotations

import torch
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from torch import Tensor
from torch.nn.functional import interpolate

from pivot_megatron.config.schema import Layout, Precision
from pivot_megatron.data.views import Tiling, View
from pivot_megatron.families.architecture import EncoderArchitecture, HeadArchitecture
from pivot_megatron.model.specs import mlp_submodules, projector_config
from pivot_megatron.runtime.layers import layer_modules


class Projector(MultimodalProjector):
    """megatron-core's, with `image_newline` `[H]` where images are seen as `tiles`."""

    def __init__(
        self, encoder: EncoderArchitecture, head: HeadArchitecture, layout: Layout, precision: Precision, tiles: bool
    ) -> None:
        config = projector_config(encoder, head, layout, precision)
        super().__init__(config, mlp_submodules(layer_modules(), norm_before=False), "mlp", encoder.hidden)
        newline = torch.nn.Parameter(torch.empty(head.hidden, dtype=config.params_dtype)) if tiles else None
        self.image_newline = newline

    def tokens(self, patches: Tensor, views: tuple[View, ...]) -> Tensor:
        """Projected patches `[n, H]` of all images' sequences to the tokens of all `views`, `[P, H]`, image after image."""
        if self.image_newline is None:
            return patches
        counts = [sum(rows * columns for rows, columns in view.grids) for view in views]
        images = [
            patches_of if view.tiling is None else joined(patches_of, view.grids[0], view.tiling, self.image_newline)
            for patches_of, view in zip(patches.split(counts), views, strict=True)
        ]
        # Where no image is tiled, the newline's gradient is zero, not missing.
        return torch.cat(images) + 0.0 * self.image_newline


def joined(patches: Tensor, grid: tuple[int, int], tiling: Tiling, newline: Tensor) -> Tensor:
    """One image's tokens of its squares' patches `[(1 + tiles) * grid, H]`: the whole image's, then those of its tiles line by
    line, each line ended by `newline`. Equal to `pack_image_features` of transformers' LLaVA-OneVision."""
    (down, across), (rows, columns) = grid, tiling.tiles
    whole, tiles = patches.split([down * across, rows * columns * down * across])
    laid = tiles.view(rows, columns, down, across, -1).permute(4, 0, 2, 1, 3).reshape(-1, rows * down, columns * across)
    laid = laid[:, tiling.top : tiling.top + tiling.height, tiling.left : tiling.left + tiling.width]
    if tiling.scaled is not None:
        laid = interpolate(laid[None], tiling.scaled, mode="bilinear")[0]
    lines = torch.cat([laid, newline[:, None, None].expand(-1, laid.shape[1], 1)], dim=2)
    return torch.cat([whole, lines.flatten(1).T])
