"""What probes read: the encoders of Hugging Face folders, checkpoints and runs, and language models."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from torch.nn.functional import gelu, linear

from pivot_megatron.checkpoints.folder import resolve_checkpoint
from pivot_megatron.convert.commands import EXPORT_NOTE, export_checkpoint
from pivot_megatron.convert.export import Trained
from pivot_megatron.convert.fingerprint import folder_fingerprint
from pivot_megatron.convert.hf import HfTensors, read_json
from pivot_megatron.convert.reference import ReferenceEncoder, reference_encoder
from pivot_megatron.convert.store import describe
from pivot_megatron.convert.stream import CheckpointParameters
from pivot_megatron.data.build import image_views
from pivot_megatron.errors import UserError
from pivot_megatron.families.architecture import EncoderArchitecture
from pivot_megatron.families.registry import ENCODERS, encoder_architecture
from pivot_megatron.probe.encoder import FeaturePlace, FrozenEncoder
from pivot_megatron.probe.kept import made_by
from pivot_megatron.runtime.device import current_platform

SEEN_BY = (
    "pivot_megatron.convert.reference",
    "pivot_megatron.data.images",
    "pivot_megatron.data.views",
    "pivot_megatron.probe.encoder",
    "pivot_megatron.probe.features",
    "torch",
    "transformers",
)
"""What decides an encoder's features beside its files and the image's, as `made_by` takes it."""


def require_sources(sources: Sequence[Path], projected: bool = False) -> None:
    """Raises UserError for the first that holds no encoder, before any work is done for another."""
    for source in sources:
        if not (source / "config.json").is_file():
            resolve_checkpoint(source)
            continue
        if projected:
            raise UserError(
                f"{source}: an encoder's own folder has no projector; give the checkpoint, or a run's folder"
            )
        encoder_architecture(read_json(source / "config.json"), str(source / "config.json"))
        require_safetensors(source)


def require_safetensors(folder: Path) -> None:
    """Raises UserError where `folder` holds no weights, or only such as are a pickle, or not all files that its index names."""
    HfTensors(folder).release()


@contextmanager
def opened(source: Path, feature_layer: int | None = None, projected: bool = False) -> Iterator[FrozenEncoder]:
    """The encoder of a Hugging Face folder, of a checkpoint, or of a run's newest one.

    `feature_layer`: where not where the trainer takes features of it, as an export says, or else its family; counted from the end
    of the original encoder, whose last layers an export may have dropped. `projected`: features are what the language model
    sees, past the checkpoint's projector.

    Raises UserError where there is no such encoder, or not all of it.
    """
    require_sources([source], projected)
    if (source / "config.json").is_file():
        yield _of_folder(source, feature_layer)
        return
    checkpoint = resolve_checkpoint(source)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "encoder"
        export_checkpoint(checkpoint, "encoder", folder, "drop", None)
        encoder = _of_folder(folder, feature_layer)
        yield _with_projector(encoder, checkpoint) if projected else encoder


def _of_folder(folder: Path, feature_layer: int | None) -> FrozenEncoder:
    where = folder / "config.json"
    arch = encoder_architecture(read_json(where), str(where))
    place = _feature_place(folder, arch, feature_layer)
    views = image_views(folder, arch, None, None, None)
    model = reference_encoder(arch.family, folder, "sdpa")
    _require_weights(folder, model, place)
    model.model.to(current_platform().device)
    told = f"{folder_fingerprint(folder)} {views.fingerprint} {place.told} {made_by(*SEEN_BY)}"
    return FrozenEncoder(model, arch, place, views, hashlib.sha256(told.encode()).hexdigest(), arch.hidden)


def _feature_place(folder: Path, arch: EncoderArchitecture, feature_layer: int | None) -> FeaturePlace:
    """Layers of the original are counted from its end; those of `folder`, without the dropped ones, from their beginning."""
    note = folder / EXPORT_NOTE
    told = read_json(note) if note.is_file() else {}
    dropped = -1 - int(told["feature_layer"]) if told.get("last_layer") == "drop" else 0
    original = arch.layers + dropped
    if feature_layer is not None:
        if not -original <= feature_layer < -dropped:
            raise UserError(
                f"{folder}: feature layer: expected {-1 - dropped} to {-original}, the layers it holds of an encoder of "
                f"{original}, from the end, found {feature_layer}"
            )
        return FeaturePlace(original + 1 + feature_layer, arch.final_norm and feature_layer == -1)
    if told:
        if told["features"] == "last_hidden_state":
            return FeaturePlace(arch.layers, True)
        places = {f"hidden_states[{-n}]": FeaturePlace(arch.layers + 1 - n, False) for n in range(1, arch.layers + 1)}
        if told["features"] not in places:
            raise UserError(
                f"{note}: features: expected one of the encoder's hidden states, found {told['features']!r}"
            )
        return places[told["features"]]
    return FeaturePlace(arch.layers + 1 + arch.feature_layer, arch.final_norm and arch.feature_layer == -1)


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


def _with_projector(encoder: FrozenEncoder, checkpoint: Path) -> FrozenEncoder:
    arch = describe(checkpoint).architecture()
    parts = dict(Trained(arch, CheckpointParameters(checkpoint / "tensors")).parts("projector"))
    weights = {name: tensor.float() for name, tensor in parts.items()}
    digest = hashlib.sha256(encoder.fingerprint.encode())
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return replace(encoder, width=arch.head.hidden, projector=_projector(weights), fingerprint=digest.hexdigest())


def _projector(weights: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """Two linears with GELU between, as transformers' LLaVA has them."""
    device = current_platform().device
    weights = {name: tensor.to(device) for name, tensor in weights.items()}
    one, two = "multi_modal_projector.linear_1", "multi_modal_projector.linear_2"

    def projector(patches: Tensor) -> Tensor:
        hidden = gelu(linear(patches, weights[f"{one}.weight"], weights[f"{one}.bias"]))
        return linear(hidden, weights[f"{two}.weight"], weights[f"{two}.bias"])

    return projector
