"""Trained tensors as Hugging Face folders: the encoder alone, or the assembled LLaVA model."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pivot_megatron.convert.hf import PROCESSOR, HfTensors, read_json, with_chunks_joined
from pivot_megatron.convert.plan import component_rows, join
from pivot_megatron.convert.store import Description
from pivot_megatron.convert.stream import CheckpointParameters
from pivot_megatron.data.chat import QWEN_1_5_JINJA
from pivot_megatron.data.images import square_processor
from pivot_megatron.errors import UserError
from pivot_megatron.families.registry import ENCODERS
from pivot_megatron.model.composition import Architecture

Export = tuple[dict[str, Any], Iterator[tuple[str, Tensor]]]
"""config.json, and tensors as they are read."""


def stored_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that a `config.json` says its tensors have."""
    name = config.get("dtype") or config.get("torch_dtype")
    return getattr(torch, name) if isinstance(name, str) else None


@dataclass(frozen=True)
class Trained:
    """A checkpoint's parameters as Hugging Face parts, one row of a component's table at a time."""

    arch: Architecture
    parameters: CheckpointParameters

    def parts(self, component: str, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
        """In `dtype`, or as trained; chunks of one tensor apart."""
        for row in component_rows(self.arch, component):
            parameter = self.parameters.read(f"{component}.{row.megatron}")
            for name, part in zip(row.hf, join(row.transform, [parameter]), strict=True):
                yield name, part if dtype is None else part.to(dtype)


def export_encoder(
    description: Description,
    trained: Trained,
    last_layer: Literal["drop", "original"],
    original: HfTensors | None,
    trained_dtype: torch.dtype = torch.float32,
) -> Export:
    """The vision encoder under hub key names, in the dtype of the checkpoint it came from.

    `drop`: the layers up to the feature layer and nothing past it; features are `hidden_states[-1]`, or past the final norm
    where the family has them there. A norm that Hugging Face's class always has and nothing trained is the identity scale.
    `original`: what stands past the features comes from `original` unchanged, and so does every tensor that did not train:
    features are where they were before.
    `trained_dtype`: in which the run held its weights; a tensor that is still the original rounded to it did not train.
    """
    arch = description.architecture()
    family = ENCODERS[arch.encoder.family]
    stored = read_json(description.encoder / "config.json")
    parts = trained.parts("encoder", stored_dtype(stored))
    if last_layer == "original" and original is None:
        raise UserError("--last-layer original: needs --original, the encoder folder that the run started from")
    whole = _with_original(parts, original, family, arch, trained_dtype) if original else _alone(parts, family, arch)
    layers = arch.encoder.layers if original else arch.encoder_layers
    config = family.export_config(stored, layers, whole=original is not None)
    if arch.encoder.image_size != config.get("image_size", arch.encoder.image_size):
        config["image_size"] = arch.encoder.image_size
    return config, whole


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
    trained_dtype: torch.dtype,
) -> Iterator[tuple[str, Tensor]]:
    used = original.holding(part for row in component_rows(arch, "encoder") for part in row.hf)
    yield from with_chunks_joined((n, as_stored(t, original.read(n), trained_dtype)) for n, t in parts)
    for name in original.names():
        if name not in used and not name.removeprefix(family.HF_PREFIX).startswith(family.ELSEWHERE):
            yield _hub_name(name, family), original.read(name)


def _hub_name(stored: str, family: Any) -> str:
    """Of a tensor past the features, which transformers spells alike but for the prefix."""
    bare = stored.removeprefix(family.HF_PREFIX)
    return family.HF_PREFIX + bare if family.LAYER_PREFIX.startswith(family.HF_PREFIX) else bare


def as_stored(trained: Tensor, original: Tensor, trained_dtype: torch.dtype) -> Tensor:
    """`trained` in the original's dtype; the original's own bits where training in `trained_dtype` left it as it was.

    One that has another shape by now, as positions of another resolution, is no longer the original's.
    """
    if trained.shape != original.shape:
        return trained.to(original.dtype)
    unchanged = torch.equal(original.to(trained_dtype), trained.to(trained_dtype))
    return original if unchanged else trained.to(original.dtype)


_LLAVA_NAMES = {
    "vision_model.": "vision_tower.vision_model.",
    "multi_modal_projector.": "multi_modal_projector.",
    "model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}


def _llava_name(name: str) -> str:
    for prefix, replacement in _LLAVA_NAMES.items():
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    raise ValueError(f"no LLaVA name for {name}")


def select_strategy(arch: Architecture) -> Literal["default", "full"]:
    """transformers' word for leaving a class token out, or having none."""
    return "default" if arch.encoder.class_token else "full"


def export_mllm(description: Description, trained: Trained, image_token: int) -> Export:
    """Encoder (up to the feature layer), projector and head as `LlavaForConditionalGeneration`, under its hub key names."""
    from transformers import AutoConfig, LlavaConfig

    arch = description.architecture()
    if arch.final_norm:
        raise UserError(
            f"{arch.encoder.family}: its features are past the final norm, and transformers' LLaVA takes them before it; "
            "export the encoder alone (--part encoder)"
        )
    text = read_json(description.llm / "config.json")
    encoder_config, encoder = export_encoder(description, trained, "drop", None)
    others = (trained.parts(name, stored_dtype(text)) for name in ("projector", "llm"))
    tensors = ((_llava_name(name), tensor) for name, tensor in itertools.chain(encoder, *others))
    vision_type, text_type = encoder_config.pop("model_type"), text.pop("model_type")
    config: dict[str, Any] = LlavaConfig(
        vision_config=AutoConfig.for_model(vision_type, **encoder_config),
        text_config=AutoConfig.for_model(text_type, **text),
        image_token_index=image_token,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        vision_feature_select_strategy=select_strategy(arch),
        image_seq_length=arch.encoder.tokens,
        tie_word_embeddings=arch.head.tied_embeddings,
        architectures=["LlavaForConditionalGeneration"],
    ).to_dict()
    return config, tensors


def image_token_and_processor(description: Description, out: Path) -> int:
    """Save tokenizer and processor with an `<image>` token of its own to `out`; returns the token's id.

    The token takes the first free id, which the embedding must already have a row for.
    """
    from transformers import AutoImageProcessor, AutoTokenizer, LlavaProcessor

    arch = description.architecture()
    tokenizer = AutoTokenizer.from_pretrained(description.llm, local_files_only=True)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    token: int = tokenizer.convert_tokens_to_ids("<image>")  # type: ignore[assignment]
    if token >= arch.head.vocabulary:
        raise UserError(
            f"{description.llm}: the tokenizer uses all {arch.head.vocabulary} rows of the embedding, so no id is free for "
            "<image>; add a row to the head before training"
        )
    if description.template != "tokenizer":
        tokenizer.chat_template = QWEN_1_5_JINJA  # Qwen2.5's own would put another system prompt in front
    with tempfile.TemporaryDirectory() as scratch:
        file = processor_file(description, Path(scratch))
        if file is None:
            raise UserError(
                f"{description.encoder / PROCESSOR}: no such file; an assembled model needs the encoder's own"
            )
        image_processor = AutoImageProcessor.from_pretrained(file.parent, local_files_only=True)
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=arch.encoder.patch_size,
        vision_feature_select_strategy=select_strategy(arch),
        num_additional_image_tokens=arch.encoder.places - arch.encoder.tokens,
        image_token="<image>",
        chat_template=tokenizer.chat_template,
    )
    processor.save_pretrained(out)
    return token


def processor_file(description: Description, scratch: Path) -> Path | None:
    """`preprocessor_config.json` that makes the pixels which the encoder trained on: its own, or one that resizes to the same
    square, written to `scratch`. None where its folder has none."""
    stored = description.encoder / PROCESSOR
    if not stored.exists():
        return None
    config, size = read_json(stored), description.architecture().encoder.image_size
    if not config.get("do_center_crop") and config.get("size") == {"height": size, "width": size}:
        return stored
    made = scratch / PROCESSOR
    made.write_text(json.dumps(square_processor(config, size), indent=2) + "\n")
    return made
