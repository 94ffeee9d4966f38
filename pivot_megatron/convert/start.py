"""Where a run's model starts from: its architecture, and its weights, component by component."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pivot_megatron.checkpoints.folder import resolve_checkpoint
from pivot_megatron.config.schema import Component, Model
from pivot_megatron.convert.hf import read_json
from pivot_megatron.convert.load import FreshParts, hf_source, load_component
from pivot_megatron.convert.plan import COMPONENTS, part_shapes
from pivot_megatron.convert.store import Description, describe, load_weights
from pivot_megatron.errors import UserError
from pivot_megatron.families.architecture import differences
from pivot_megatron.families.registry import encoder_architecture
from pivot_megatron.model.composition import Architecture, Stage

SECOND_LINEAR = "projector.encoder.linear_fc2."


def _hf_folder(component: Component, name: str) -> Path:
    if component.checkpoint is not None:
        description = describe(resolve_checkpoint(component.checkpoint))
        return description.encoder if name == "encoder" else description.llm
    folder = component.hf or component.fresh
    if folder is None:
        raise UserError(f"model.{name}: one of hf, checkpoint, fresh must say where it starts from")
    return folder


def describe_start(model: Model) -> Description:
    """The Hugging Face folders that describe what `model` asks for, and where features are taken: as `model` says, else as the
    checkpoint that the encoder comes from has it, else as its family does. Tiles: as `model` says, else as the projector's."""
    encoder = model.encoder
    folder, image_size, max_patches = _hf_folder(encoder, "encoder"), encoder.image_size, encoder.max_patches
    projector = model.projector.checkpoint
    if encoder.checkpoint is not None:
        before = describe(resolve_checkpoint(encoder.checkpoint))
        feature_layer = before.feature_layer
        image_size = before.image_size if image_size is None else image_size
        max_patches = before.max_patches if max_patches is None else max_patches
    else:
        feature_layer = encoder_architecture(
            read_json(folder / "config.json"), str(folder / "config.json")
        ).feature_layer
    return Description(
        folder,
        _hf_folder(model.llm, "llm"),
        feature_layer if encoder.feature_layer is None else encoder.feature_layer,
        image_size,
        max_patches,
        model.anyres or (describe(resolve_checkpoint(projector)).anyres if projector is not None else None),
    )


def pinned(model: Model) -> Model:
    """`model` with each `checkpoint:` resolved to the one checkpoint it means now."""
    return with_checkpoints(
        model,
        {
            name: str(resolve_checkpoint(component.checkpoint).resolve())
            for name in COMPONENTS
            if (component := getattr(model, name)).checkpoint is not None
        },
    )


def with_checkpoints(model: Model, checkpoints: Mapping[str, str]) -> Model:
    """`model` with components beginning from these checkpoints. Raises UserError if one is gone."""
    changed: dict[str, Any] = {}
    for name, path in checkpoints.items():
        if not (Path(path) / "model.json").exists():
            raise UserError(f"model.{name}.checkpoint: this run began from {path}, which is gone; restore it to go on")
        changed[name] = dataclasses.replace(getattr(model, name), checkpoint=Path(path))
    return dataclasses.replace(model, **changed)


def checkpoints_of(model: Model) -> dict[str, str]:
    return {name: str(c.checkpoint) for name in COMPONENTS if (c := getattr(model, name)).checkpoint is not None}


def start_weights(model: Stage, start: Model, seed: int) -> None:
    """Set every weight of this stage as `start` says. Collective over all ranks where a checkpoint is read."""
    for name in COMPONENTS:
        component: Component = getattr(start, name)
        if component.checkpoint is not None:
            checkpoint = resolve_checkpoint(component.checkpoint)
            _check_fits(model, checkpoint, name)
            fresh = fresh_parameters(start, checkpoint, model.arch) if name == "projector" else []
            if fresh:
                load_component(model, name, FreshParts(part_shapes(model.arch, name), seed))
            load_weights(model, checkpoint, name, leave=fresh)
        elif component.hf is not None:
            load_component(model, name, hf_source(model.arch, name, component.hf))
        else:
            if name == "encoder" and model.arch.encoder.fixed_positions:
                raise UserError(
                    f"model.encoder.fresh: {model.arch.encoder.family} has positions that are not learned, so there is "
                    "nothing to draw them from; start it from `hf`"
                )
            load_component(model, name, FreshParts(part_shapes(model.arch, name), seed))


def fresh_parameters(start: Model, checkpoint: Path, arch: Architecture) -> list[str]:
    """The projector's parameters that `checkpoint`, which it starts from, does not give: the second linear where the first alone
    is kept, and the newline of tiles where it was trained on squares."""
    found = [f"{SECOND_LINEAR}{kind}" for kind in ("weight", "bias")] if start.projector.keep == "first" else []
    if arch.anyres is not None and describe(checkpoint).anyres is None:
        found.append("projector.image_newline")
    return found


def _check_fits(model: Stage, checkpoint: Path, name: str) -> None:
    theirs, ours = describe(checkpoint).architecture(), model.arch
    wanted = {
        "encoder": (ours.encoder, theirs.encoder),
        "llm": (ours.head, theirs.head),
        "projector": ((ours.encoder.hidden, ours.head.hidden), (theirs.encoder.hidden, theirs.head.hidden)),
    }
    expected, found = wanted[name]
    if expected != found:
        told = f"widths {expected}, found {found}" if name == "projector" else differences(expected, found)
        hint = "; to change resolution, export the encoder and start from that" if told.startswith("image_size") else ""
        raise UserError(f"model.{name}.checkpoint: {checkpoint}: expected {told}{hint}")
    if name == "encoder" and ours.feature_layer != theirs.feature_layer:
        raise UserError(
            f"model.encoder.feature_layer: {checkpoint} was trained with {theirs.feature_layer} and holds no layer past it, "
            f"found {ours.feature_layer}; set it to {theirs.feature_layer}"
        )
