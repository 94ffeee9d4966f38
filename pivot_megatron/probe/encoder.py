"""A frozen encoder in its library's own class: patch features of images, where the trainer takes them."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pivot_megatron.convert.reference import ReferenceEncoder
from pivot_megatron.data.images import ImageError, image_size_of
from pivot_megatron.data.views import Grid, ImageViews, pixels_of
from pivot_megatron.errors import UserError
from pivot_megatron.families.architecture import EncoderArchitecture
from pivot_megatron.runtime.device import current_platform


@dataclass(frozen=True)
class FeaturePlace:
    """Where features are taken: of the output of layer number `layer`, the first being 1 as in transformers' `hidden_states`; or
    after the final norm that follows the last (`normed`)."""

    layer: int
    normed: bool

    @property
    def told(self) -> str:
        return "last_hidden_state" if self.normed else f"hidden_states[{self.layer}]"


@dataclass(frozen=True)
class FrozenEncoder:
    """`projector`: what patches `[..., hidden]` pass through after it, if anything. `width`: of features. `fingerprint`: equal
    for equal features."""

    model: ReferenceEncoder
    arch: EncoderArchitecture
    place: FeaturePlace
    views: ImageViews
    fingerprint: str
    width: int
    projector: Callable[[Tensor], Tensor] | None = None

    @torch.no_grad()
    def patches(self, images: Sequence[tuple[str, bytes]]) -> list[Tensor]:
        """Features of the patches of each of (name, encoded image): `[patches, width]` float32 on the device, class token left
        out. Raises UserError naming an image that does not decode."""
        (state,), grids = self._passed(images, [self.place.layer])
        found = self._patches(state, grids)
        return found if self.projector is None else [self.projector(patches) for patches in found]

    @torch.no_grad()
    def layer_means(self, images: Sequence[tuple[str, bytes]]) -> Tensor:
        """`[layers, images, width]` float32 on the device: of each layer up to where features are taken, the mean over
        patches."""
        states, grids = self._passed(images, range(1, self.place.layer + 1))
        return torch.stack([torch.stack([one.mean(dim=0) for one in self._patches(state, grids)]) for state in states])

    def _passed(self, images: Sequence[tuple[str, bytes]], layers: Sequence[int]) -> tuple[list[Tensor], list[Grid]]:
        """Of each of `layers` `[images, places, hidden]`, that of features normed if they are, and each image's patches down
        and across."""
        with ThreadPoolExecutor() as pool:
            seen = list(pool.map(partial(_pixels, self.views), images))
        grids = [grid for _, grid in seen]
        return self._states([pixels.to(current_platform().device) for pixels, _ in seen], grids, layers), grids

    def _patches(self, state: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
        first = int(self.arch.class_token)
        return [one[first : first + rows * columns] for one, (rows, columns) in zip(state, grids, strict=True)]

    def _states(self, pixels: Sequence[Tensor], grids: Sequence[Grid], layers: Sequence[int]) -> list[Tensor]:
        kept: list[Tensor] = []

        def keep(_layer: Any, _inputs: Any, output: Any) -> None:
            kept.append(output[0] if isinstance(output, tuple) else output)

        all_layers = self.model.layers(self.arch.layers)
        hooks = [all_layers[number - 1].register_forward_hook(keep) for number in layers]
        try:
            # TF32 is off for products as torch comes, and on for convolutions, of which one cuts images into patches.
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                last = self.model(pixels, grids)
        finally:
            for hook in hooks:
                hook.remove()
        return [*kept[:-1], last] if self.place.normed else kept


def _pixels(views: ImageViews, image: tuple[str, bytes]) -> tuple[Tensor, Grid]:
    name, encoded = image
    try:
        pixels, (width, height) = pixels_of(views, encoded, "pil"), image_size_of(io.BytesIO(encoded))
    except ImageError as error:
        raise UserError(f"{name}: not an image that can be read ({error.detail})") from None
    (grid,) = views.view(width, height).grids
    return pixels, grid
