"""Hugging Face's LLaVA and LLaVA-OneVision taken apart: what describes each component, and its tensors."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pivot_megatron.config.schema import AnyRes
from pivot_megatron.convert.hf import PROCESSOR, TOKENIZER_FILES, HfTensors, read_json
from pivot_megatron.convert.load import Source, at_resolution, may_be_left, require_whole
from pivot_megatron.convert.plan import COMPONENTS
from pivot_megatron.convert.processors import pinpoints, select_strategy
from pivot_megatron.convert.store import Description
from pivot_megatron.errors import UserError
from pivot_megatron.families.registry import ENCODERS, encoder_architecture
from pivot_megatron.model.composition import Architecture

# By model type: where features are taken, and whether the class token goes with them, unless a config says otherwise.
_DEFAULTS = {"llava": (-2, "default"), "llava_onevision": (-1, "full")}


@dataclass(frozen=True)
class Assembled:
    """`folder` is the model's; `description` of its components lies in folders that were made from it."""

    folder: Path
    description: Description

    def sources(self) -> dict[str, Source]:
        """Of every component. Raises UserError where they are not those that config.json speaks of."""
        arch = self.description.architecture()
        tensors = {name: HfTensors(self.folder, partial(spellings_in, arch, name)) for name in COMPONENTS}
        require_whole(arch, tensors, partial(_may_be_left, arch))
        config = self.description.encoder / "config.json"
        return {**tensors, "encoder": at_resolution(arch, tensors["encoder"], read_json(config), str(config))}


def take_apart(
    folder: Path, scratch: Path, feature_layer: int | None = None, image_size: int | None = None
) -> Assembled:
    """`folder`'s components described in folders below `scratch`.

    Raises UserError for anything but a LLaVA whose features are taken where this project takes them.
    """
    where = folder / "config.json"
    config = read_json(where)
    if config.get("model_type") not in _DEFAULTS:
        raise UserError(f"{where}: model_type: expected {' or '.join(_DEFAULTS)}, found {config.get('model_type')}")
    default_layer, default_strategy = _DEFAULTS[config["model_type"]]
    if config.get("projector_hidden_act", "gelu") != "gelu" or not config.get("multimodal_projector_bias", True):
        raise UserError(f"{where}: expected a projector with GELU and biases, found another")
    layer = config.get("vision_feature_layer", default_layer) if feature_layer is None else feature_layer
    if not isinstance(layer, int) or layer >= 0:
        raise UserError(f"{where}: vision_feature_layer: expected a number from the end, such as -2, found {layer}")
    encoder, llm = scratch / "encoder", scratch / "llm"
    for part, key in ((encoder, "vision_config"), (llm, "text_config")):
        part.mkdir(parents=True)
        (part / "config.json").write_text(json.dumps(_whole_config(config, key, where), indent=2) + "\n")
    (encoder / PROCESSOR).write_text(json.dumps(_of_one_square(_image_processor(folder)), indent=2) + "\n")
    for file in TOKENIZER_FILES:
        if (folder / file).exists():
            shutil.copyfile(folder / file, llm / file)
    description = Description(encoder, llm, layer, image_size)
    try:
        arch = description.architecture()
    except UserError as error:  # by the file that the user knows
        told = str(error)
        for part, key in ((encoder, "vision_config"), (llm, "text_config")):
            told = told.replace(str(part / "config.json"), f"{where}: {key}")
        raise UserError(told) from None
    _check_strategy(arch, config.get("vision_feature_select_strategy", default_strategy), where)
    if config["model_type"] == "llava_onevision":
        tile = encoder_architecture(read_json(encoder / "config.json"), str(where)).image_size
        anyres = _anyres(config, tile, where)
        theirs = _image_processor(folder).get("image_grid_pinpoints", pinpoints(anyres, tile))
        if theirs != pinpoints(anyres, tile):
            raise UserError(
                f"{folder}: image_grid_pinpoints: config.json and the image processor disagree; make them one"
            )
        description = dataclasses.replace(description, anyres=anyres)
    return Assembled(folder, description)


def _anyres(config: Mapping[str, Any], tile: int, where: Path) -> AnyRes:
    """`tile`: pixels a side of the model's tiles."""
    ratio, grids = str(config.get("vision_aspect_ratio", "anyres_max_9")), config.get("image_grid_pinpoints")
    most = re.fullmatch(r"anyres_max_([1-9][0-9]*)", ratio)
    if most is None:
        raise UserError(f"{where}: vision_aspect_ratio: expected anyres_max_ and a number, found {ratio}")
    if not isinstance(grids, list) or not grids or not all(_is_grid(grid, tile) for grid in grids):
        raise UserError(
            f"{where}: image_grid_pinpoints: expected [height, width] in whole tiles of {tile} pixels, found {grids}"
        )
    return AnyRes(tuple((height // tile, width // tile) for height, width in grids), int(most[1]))


def _is_grid(grid: Any, tile: int) -> bool:
    return isinstance(grid, list) and len(grid) == 2 and all(type(n) is int and n > 0 and n % tile == 0 for n in grid)


def _whole_config(config: Mapping[str, Any], key: str, where: Path) -> dict[str, Any]:
    """A component's config with the defaults that the assembled one leaves out."""
    from transformers import AutoConfig

    part = dict(config.get(key) or {})
    if "model_type" not in part:
        raise UserError(f"{where}: {key}: expected a model_type, found none")
    try:
        whole: dict[str, Any] = AutoConfig.for_model(**part).to_dict()
    except Exception as error:  # the library checks values in its own ways
        raise UserError(f"{where}: {key}: not a config that transformers reads ({_first_line(error)})") from None
    if key == "text_config":
        tied = config.get("tie_word_embeddings", whole.get("tie_word_embeddings", False))
        whole["tie_word_embeddings"] = part.get("tie_word_embeddings", tied)
    whole["dtype"] = part.get("dtype") or config.get("dtype") or config.get("torch_dtype")
    return whole


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _image_processor(folder: Path) -> dict[str, Any]:
    """A file of its own until transformers 4, a part of the processor's since."""
    if (folder / PROCESSOR).exists():
        return read_json(folder / PROCESSOR)
    found = read_json(folder / "processor_config.json").get("image_processor")
    if not isinstance(found, dict):
        raise UserError(
            f"{folder}: expected {PROCESSOR}, or an image_processor in processor_config.json, found neither"
        )
    return found


def _of_one_square(config: Mapping[str, Any]) -> dict[str, Any]:
    """An image processor of tiles to what each tile goes through; that of a plain LLaVA stays as it is."""
    if "image_grid_pinpoints" not in config:
        return dict(config)
    of_tiles = ("image_grid_pinpoints", "do_pad", "pad_size", "image_processor_type", "processor_class")
    return {name: value for name, value in config.items() if name not in of_tiles}


def _check_strategy(arch: Architecture, found: str, where: Path) -> None:
    wanted = select_strategy(arch)
    if found != wanted:
        raise UserError(
            f"{where}: vision_feature_select_strategy: expected {wanted} for {arch.encoder.family} (patches, no class token), "
            f"found {found}"
        )


def spellings_in(arch: Architecture, component: str, name: str) -> list[str]:
    """The hub's, and that of a fresh save of transformers 5."""
    if component == "encoder":
        bare = name.removeprefix(ENCODERS[arch.encoder.family].HF_PREFIX)
        return [
            f"vision_tower.{name}",
            f"vision_tower.{bare}",
            f"model.vision_tower.{bare}",
            f"model.vision_tower.{name}",
        ]
    if component == "projector":
        return [name, f"model.{name}"]
    return [f"language_model.{name}", f"model.language_model.{name.removeprefix('model.')}", name]


def _may_be_left(arch: Architecture, name: str) -> bool:
    """The encoder's tensors past the features, and what a head may hold beside its own."""
    for tower in ("model.vision_tower.", "vision_tower."):
        if name.startswith(tower):
            bare = name.removeprefix(tower).removeprefix(ENCODERS[arch.encoder.family].HF_PREFIX)
            return may_be_left(arch, "encoder", bare)
    return may_be_left(arch, "llm", name.removeprefix("model.").removeprefix("language_model."))
