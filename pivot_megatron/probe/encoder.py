"""A frozen encoder in its library's own class: patch features of images, where the trainer takes them."""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from pivot_megatron.checkpoints.folder import resolve_checkpoint
from pivot_megatron.convert.commands import export_checkpoint
from pivot_megatron.convert.export import Trained
from pivot_megatron.convert.fingerprint import folder_fingerprint
from pivot_megatron.convert.hf import read_json
from pivot_megatron.convert.reference import ReferenceEncoder, reference_encoder
from pivot_megatron.convert.store import describe
from pivot_megatron.convert.stream import CheckpointParameters
from pivot_megatron.data.build import image_views
from pivot_megatron.data.images import ImageError, image_size_of
from pivot_megatron.data.views import Grid, ImageViews, pixels_of
from pivot_megatron.errors import UserError
from pivot_megatron.families.architecture import EncoderArchitecture
from pivot_megatron.families.registry import ENCODERS, encoder_architecture
from pivot_megatron.runtime.device import current_platform

_EXPORT_NOTE = "pivot_export.json"


@dataclass(frozen=True)
class FeaturePlace:
    """Where features are taken: after the last layer's final norm (`normed`), or of hidden state `layer`, counted from the end:
    -1 is the last layer's output."""

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
        states, grids = self._passed(images)
        found = self._patches(states[-1], grids)
        return found if self.projector is None else [self.projector(patches) for patches in found]

    @torch.no_grad()
    def layer_means(self, images: Sequence[tuple[str, bytes]]) -> Tensor:
        """`[layers, images, width]` float32 on the device: of each layer up to where features are taken, the mean over
        patches."""
        states, grids = self._passed(images)
        return torch.stack([torch.stack([one.mean(dim=0) for one in self._patches(state, grids)]) for state in states])

    def _passed(self, images: Sequence[tuple[str, bytes]]) -> tuple[list[Tensor], list[Grid]]:
        """Of each layer `[images, places, hidden]`, the last of them the features, and each image's patches down and across."""
        with ThreadPoolExecutor() as pool:
            seen = list(pool.map(partial(_pixels, self.views), images))
        grids = [grid for _, grid in seen]
        return self._states([pixels.to(current_platform().device) for pixels, _ in seen], grids), grids

    def _patches(self, state: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
        first = int(self.arch.class_token)
        return [one[first : first + rows * columns] for one, (rows, columns) in zip(state, grids, strict=True)]

    def _states(self, pixels: Sequence[Tensor], grids: Sequence[Grid]) -> list[Tensor]:
        kept: list[Tensor] = []

        def keep(_layer: Any, _inputs: Any, output: Any) -> None:
            kept.append(output[0] if isinstance(output, tuple) else output)

        layers = list(self.model.layers(self.arch.layers))[: self.arch.layers + self.place.layer + 1]
        hooks = [layer.register_forward_hook(keep) for layer in layers]
        try:
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


@contextmanager
def opened(source: Path, feature_layer: int | None = None, projected: bool = False) -> Iterator[FrozenEncoder]:
    """The encoder of a Hugging Face folder, of a checkpoint, or of a run's newest one.

    `feature_layer`: where not where the trainer takes features of it, as an export says, or else its family. `projected`:
    features are what the language model sees, past the checkpoint's projector.

    Raises UserError where there is no such encoder, or not all of it.
    """
    if (source / "config.json").is_file():
        if projected:
            raise UserError(
                f"{source}: an encoder's own folder has no projector; give the checkpoint, or a run's folder"
            )
        yield _of_folder(source, feature_layer)
        return
    checkpoint = resolve_checkpoint(source)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "encoder"
        export_checkpoint(checkpoint, "encoder", folder, "drop", None)
        encoder = _of_folder(folder, feature_layer)
        width = describe(checkpoint).architecture().head.hidden
        yield replace(encoder, width=width, projector=_projector(checkpoint)) if projected else encoder


def _of_folder(folder: Path, feature_layer: int | None) -> FrozenEncoder:
    where = folder / "config.json"
    arch = encoder_architecture(read_json(where), str(where))
    place = _feature_place(folder, arch, feature_layer)
    if not -arch.layers <= place.layer < 0:
        raise UserError(
            f"{folder}: feature layer: expected -1 to {-arch.layers}, the encoder's layers from the end, found {place.layer}"
        )
    views = image_views(folder, arch, None, None, None)
    model = reference_encoder(arch.family, folder, "sdpa")
    _require_weights(folder, model, place)
    model.model.to(current_platform().device)
    told = f"{folder_fingerprint(folder)} {views.fingerprint} {place.told}"
    return FrozenEncoder(model, arch, place, views, hashlib.sha256(told.encode()).hexdigest(), arch.hidden)


def _feature_place(folder: Path, arch: EncoderArchitecture, feature_layer: int | None) -> FeaturePlace:
    note = folder / _EXPORT_NOTE
    if feature_layer is None and note.is_file():
        told = read_json(note)["features"]
        places = [FeaturePlace(-1, True), *(FeaturePlace(layer, False) for layer in range(-1, -arch.layers - 1, -1))]
        for place in places:
            if place.told == told:
                return place
        raise UserError(f"{note}: features: expected one of the encoder's hidden states, found {told!r}")
    layer = arch.feature_layer if feature_layer is None else feature_layer
    return FeaturePlace(layer, arch.final_norm and layer == -1)


def _require_weights(folder: Path, model: ReferenceEncoder, place: FeaturePlace) -> None:
    """An absent tensor would be drawn at random, and a probe would measure noise."""
    family = ENCODERS[model.family]
    past = tuple(
        name for name in family.PAST_FEATURES if not place.normed or not family.NORM_PAST_FEATURES.endswith(name[:-1])
    )
    missing = [name for name in model.missing if not name.removeprefix(family.HF_PREFIX).startswith(past)]
    if missing:
        raise UserError(
            f"{folder}: expected every weight of the encoder, found {len(missing)} missing (first: {missing[0]}); export or "
            "fetch it again"
        )


def _projector(checkpoint: Path) -> Callable[[Tensor], Tensor]:
    """Two linears with GELU between, as transformers' LLaVA has them."""
    arch = describe(checkpoint).architecture()
    parts = dict(Trained(arch, CheckpointParameters(checkpoint / "tensors")).parts("projector"))
    device = current_platform().device
    weights = {name: tensor.float().to(device) for name, tensor in parts.items()}
    one, two = "multi_modal_projector.linear_1", "multi_modal_projector.linear_2"

    def projector(patches: Tensor) -> Tensor:
        hidden = gelu(linear(patches, weights[f"{one}.weight"], weights[f"{one}.bias"]))
        return linear(hidden, weights[f"{two}.weight"], weights[f"{two}.bias"])

    return projector
