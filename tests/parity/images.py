"""Images of every kind that encoders see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pivot_megatron.data.views import View
from pivot_megatron.families.architecture import EncoderArchitecture


@dataclass(frozen=True)
class Images:
    """`pixels`: of each image, as PackedBatch has them."""

    pixels: list[Tensor]
    views: tuple[View, ...]

    def places(self, arch: EncoderArchitecture) -> int:
        """In the encoder's sequences, class tokens and all."""
        return sum(arch.class_token + rows * columns for view in self.views for rows, columns in view.grids)


def make_images(arch: EncoderArchitecture, count: int, seed: int) -> Images:
    """Squares of the encoder's own size, or of a shape each, smaller and larger than the positions' square and not square."""
    draw = torch.Generator().manual_seed(seed)
    if arch.native:
        views = tuple(View.of_patches(2 + n, 7 - 2 * n) for n in range(count))
        return Images([torch.randn(v.tokens, 3 * arch.patch_size**2, generator=draw) for v in views], views)
    size = arch.image_size
    squares = torch.randn(count, 3, size, size, generator=draw).split(1)
    return Images(list(squares), (View.of_patches(arch.grid, arch.grid),) * count)


def patches_of(hidden: Tensor, arch: EncoderArchitecture) -> Tensor:
    """`[places, hidden]` of several images without their class tokens."""
    if not arch.class_token:
        return hidden
    return hidden.view(-1, arch.places, hidden.shape[-1])[:, 1:].flatten(0, 1)
