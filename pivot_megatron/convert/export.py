"""Trained tensors as Hugging Face folders: the encoder alone, or the assembled LLaVA model."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor

from pivot_megatron.convert.hf import HfTensors, read_json, with_chunks_joined
from pivot_megatron.convert.plan import COMPONENTS, component_rows, join
from pivot_megatron.convert.processors import IMAGE, VIDEO, aspect_ratio, pinpoints, select_strategy
from pivot_megatron.convert.store import Description
from pivot_megatron.convert.stream import CheckpointParameters
from pivot_megatron.errors import UserError
from pivot_megatron.families.registry import ENCODERS
from pivot_megatron.model.composition import Architecture

Export = tuple[dict[str, Any], Iterator[tuple[str, Tensor]]]
"""config.json, and tensors as they are read."""


@dataclass(frozen=True)
class Trained:
    """A checkpoint's parameters as Hugging Face parts, one row of a component's table at a time, each in the dtype that the
    checkpoint holds it in: what is written of them is never rounded, unless to a `dtype` that is asked for."""

    arch: Architecture
    parameters: CheckpointParameters
    dtype: torch.dtype | None = None

    def parts(self, component: str) -> Iterator[tuple[str, Tensor]]:
        """Chunks of one tensor apart."""
        for row in component_rows(self.arch, component):
            parameter = self.parameters.read(f"{component}.{row.megatron}").to(dtype=self.dtype)
            yield from zip(row.hf, join(row.transform, [parameter]), strict=True)

    def widest_dtype(self, component: str) -> torch.dtype:
        """In which every part keeps all its bits."""
        if self.dtype is not None:
            return self.dtype
        rows = component_rows(self.arch, component)
        return reduce(torch.promote_types, (self.parameters.dtype(f"{component}.{row.megatron}") for row in rows))


def export_encoder(
    description: Description,
    trained: Trained,
    last_layer: Literal["drop", "original"],
    original: HfTensors | None,
) -> Export:
    """The vision encoder under hub key names, no tensor rounded.

    `drop`: the layers up to the feature layer and nothing past it; features are `hidden_states[-1]`, or past the final norm
    where the family has them there. A norm that Hugging Face's class always has and nothing trained is the identity scale.
    `original`: what stands past the features comes from `original` unchanged, and so does every tensor that did not train:
    features are where they were before.
    """
    arch = description.architecture()
    family = ENCODERS[arch.encoder.family]
    stored = read_json(description.encoder / "config.json")
    parts, dtype = trained.parts("encoder"), trained.widest_dtype("encoder")
    if last_layer == "original" and original is None:
        raise UserError("--last-layer original: needs --original, the encoder folder that the run started from")
    if original is not None:
        dtype = torch.promote_types(dtype, original.widest_dtype())
    tensors = _alone(parts, family, arch) if original is None else _with_original(parts, original, family, arch)
    layers = arch.encoder_layers if original is None else arch.encoder.layers
    config = family.export_config(stored, layers, original is not None, arch.encoder.image_size)
    return _saying(dtype, config), tensors


def _saying(dtype: torch.dtype, config: dict[str, Any]) -> dict[str, Any]:
    """`config` with the dtype that transformers loads its model in, by the key that it has; timm's has none."""
    if "model_type" not in config:
        return config
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    return {**config, key: str(dtype).removeprefix("torch.")}


def encoder_parts(arch: Architecture, original: HfTensors | None) -> list[str]:
    """What an export of the encoder holds, by hub names, chunks of one tensor apart."""
    family = ENCODERS[arch.encoder.family]
    built = [part for row in component_rows(arch, "encoder") for part in row.hf]
    if original is None:
        return [*built, f"{family.NORM_PAST_FEATURES}.weight", f"{family.NORM_PAST_FEATURES}.bias"]
    return [*built, *(_hub_name(name, family) for name in original.names())]


def _alone(parts: Iterable[tuple[str, Tensor]], family: Any, arch: Architecture) -> Iterator[tuple[str, Tensor]]:
    norm, seen = family.NORM_PAST_FEATURES, False
    dtype = torch.float32
    for name, tensor in with_chunks_joined(parts):
        seen, dtype = seen or name.startswith(norm + "."), tensor.dtype
        yield name, tensor
    if not seen:
        yield f"{norm}.weight", torch.ones(arch.encoder.hidden, dtype=dtype)
        yield f"{norm}.bias", torch.zeros(arch.encoder.hidden, dtype=dtype)


def _with_original(
    parts: Iterable[tuple[str, Tensor]],
    original: HfTensors,
    family: Any,
    arch: Architecture,
) -> Iterator[tuple[str, Tensor]]:
    used = original.holding(part for row in component_rows(arch, "encoder") for part in row.hf)
    yield from with_chunks_joined((n, as_stored(t, original.read(n))) for n, t in parts)
    for name in original.names():
        if name not in used and not name.removeprefix(family.HF_PREFIX).startswith(family.ELSEWHERE):
            yield _hub_name(name, family), original.read(name)


def _hub_name(stored: str, family: Any) -> str:
    """Of a tensor past the features, which transformers spells alike but for the prefix."""
    bare = stored.removeprefix(family.HF_PREFIX)
    return family.HF_PREFIX + bare if family.LAYER_PREFIX.startswith(family.HF_PREFIX) else bare


def as_stored(trained: Tensor, original: Tensor) -> Tensor:
    """The original's own bits where `trained` is still the original, or the original rounded to the dtype that the run held it
    in; else `trained`, in the original's dtype where that is as fine.

    One that has another shape by now, as positions of another resolution, is no longer the original's.
    """
    if trained.shape == original.shape and torch.equal(original.to(trained.dtype), trained):
        return original
    return trained.to(torch.promote_types(trained.dtype, original.dtype))


_LLAVA_NAMES = {
    "vision_model.": "vision_tower.vision_model.",
    "multi_modal_projector.": "multi_modal_projector.",
    "image_newline": "image_newline",
    "model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}


def _llava_name(name: str) -> str:
    for prefix, replacement in _LLAVA_NAMES.items():
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    raise ValueError(f"no LLaVA name for {name}")


def require_assembled(arch: Architecture) -> None:
    """Raises UserError where transformers has no assembled model for such an encoder."""
    family = arch.encoder.family
    if arch.final_norm:
        reason = "its features are past the final norm, and transformers' LLaVA takes them before it"
    elif arch.encoder.native:
        reason = "transformers has no assembled model that keeps aspect ratios"
    elif family not in ("siglip", "clip"):
        reason = "a LLaVA is exported with SigLIP and CLIP alone"
    else:
        return
    raise UserError(f"{family}: {reason}; export the encoder alone (--part encoder)")


def export_mllm(description: Description, trained: Trained, marks: Mapping[str, int]) -> Export:
    """Encoder (up to the feature layer), projector and head as `LlavaForConditionalGeneration`, or as
    `LlavaOnevisionForConditionalGeneration` where images are seen as tiles, under hub key names. `marks`: its tokens' ids."""
    from transformers import AutoConfig, LlavaConfig, LlavaOnevisionConfig

    arch, anyres = description.architecture(), description.anyres
    require_assembled(arch)
    text = _saying(trained.widest_dtype("llm"), read_json(description.llm / "config.json"))
    encoder_config, encoder = export_encoder(description, trained, "drop", None)
    others = (trained.parts(name) for name in ("projector", "llm"))
    tensors = ((_llava_name(name), tensor) for name, tensor in itertools.chain(encoder, *others))
    vision_type, text_type = encoder_config.pop("model_type"), text.pop("model_type")
    common: dict[str, Any] = {
        "vision_config": AutoConfig.for_model(vision_type, **encoder_config),
        "text_config": AutoConfig.for_model(text_type, **text),
        "image_token_index": marks[IMAGE],
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": select_strategy(arch),
        "tie_word_embeddings": arch.head.tied_embeddings,
    }
    if anyres is None:
        whole: Any = LlavaConfig(
            **common, image_seq_length=arch.encoder.tokens, architectures=["LlavaForConditionalGeneration"]
        )
    else:
        whole = LlavaOnevisionConfig(
            **common,
            image_grid_pinpoints=pinpoints(anyres, arch.encoder.image_size),
            vision_aspect_ratio=aspect_ratio(anyres),
            video_token_index=marks[VIDEO],
            architectures=["LlavaOnevisionForConditionalGeneration"],
        )
    config: dict[str, Any] = whole.to_dict()
    dtype = reduce(torch.promote_types, map(trained.widest_dtype, COMPONENTS))
    return _saying(dtype, config), tensors
