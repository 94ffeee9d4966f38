"""Every encoder and head of true size by its config alone: the library's own module, on the meta device, has these shapes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from pivot_megatron.config.schema import Layout
from pivot_megatron.convert.plan import part_shapes
from pivot_megatron.errors import UserError
from pivot_megatron.families.architecture import EncoderArchitecture
from pivot_megatron.families.registry import ENCODERS, HEADS, encoder_architecture, head_architecture
from pivot_megatron.families.table import spellings
from pivot_megatron.model.composition import Architecture
from pivot_megatron.model.fit import require_fit
from tests.parity.encoders import as_timm

LIBRARY: dict[str, tuple[Any, Any]] = {
    "siglip_vision_model": (SiglipVisionConfig, SiglipVisionModel),
    "siglip2_vision_model": (Siglip2VisionConfig, Siglip2VisionModel),
    "clip_vision_model": (CLIPVisionConfig, CLIPVisionModel),
    "dinov2": (Dinov2Config, Dinov2Model),
    "vit": (ViTConfig, ViTModel),
    "vit_mae": (ViTMAEConfig, ViTMAEModel),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def library_state(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Of a `config.json`'s model, without its weights."""
    config_class, model_class = LIBRARY[config["model_type"]]
    with torch.device("meta"):
        return dict(model_class(config_class(**config)).state_dict())


# Divides by every tensor-parallel size that is asked of a head.
ENCODER = EncoderArchitecture("siglip", 2, 96, 48, 384, 32, 8, 1e-6, "gelu_tanh", feature_layer=-2)


def _qwen(
    hidden: int, layers: int, heads: int, groups: int, ffn: int, vocabulary: int, tied: bool, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": ffn,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "rope_theta": 1e6,
        **more,
    }


@dataclass(frozen=True)
class HeadCase:
    """`largest`: tensor-parallel size without copies of key-value groups. `refused`: one that does not divide, and what of it."""

    config: dict[str, Any]
    head_dim: int
    largest: int
    refused: tuple[int, str]


HEAD_CASES = {
    "Qwen2.5-0.5B": HeadCase(_qwen(896, 24, 14, 2, 4864, 151936, True), 64, 2, (4, "LLM heads (14)")),
    "Qwen2.5-1.5B": HeadCase(_qwen(1536, 28, 12, 2, 8960, 151936, True), 128, 2, (8, "LLM heads (12)")),
    "Qwen2.5-3B": HeadCase(
        _qwen(2048, 36, 16, 2, 11008, 151936, True),
        128,
        2,
        (3, "LLM heads (16), LLM FFN width (11008), LLM key-value groups (2)"),
    ),
    "Qwen2.5-7B": HeadCase(_qwen(3584, 28, 28, 4, 18944, 152064, False), 128, 4, (8, "LLM heads (28)")),
    "Qwen2.5-14B": HeadCase(_qwen(5120, 48, 40, 8, 13824, 152064, False), 128, 8, (16, "LLM heads (40)")),
    "Qwen2.5-32B": HeadCase(_qwen(5120, 64, 40, 8, 27648, 152064, False), 128, 8, (16, "LLM heads (40)")),
    "Qwen2.5-72B": HeadCase(
        _qwen(8192, 80, 64, 8, 29568, 152064, False), 128, 8, (3, "LLM heads (64), LLM key-value groups (8)")
    ),
    "Qwen3-0.6B": HeadCase(
        _qwen(1024, 28, 16, 8, 3072, 151936, True, model_type="qwen3", head_dim=128),
        128,
        8,
        (3, "LLM heads (16), LLM key-value groups (8)"),
    ),
}


@pytest.mark.parametrize("name", HEAD_CASES)
def test_heads(name: str) -> None:
    case = HEAD_CASES[name]
    head = head_architecture(case.config, name)
    arch = Architecture(ENCODER, head, ENCODER.feature_layer)
    wanted = {name: tuple(tensor.shape) for name, tensor in library_state(case.config).items()}
    assert head.tied_embeddings == case.config["tie_word_embeddings"]
    if head.tied_embeddings:  # one tensor under two names
        assert wanted.pop("lm_head.weight") == wanted["model.embed_tokens.weight"]
    assert part_shapes(arch, "llm") == wanted
    assert head.head_dim == case.head_dim
    assert head.padded_vocabulary == head.vocabulary  # nothing of the true ones is padded
    for size in (n for n in range(1, case.largest + 1) if case.largest % n == 0):
        assert head.groups % size == 0
        require_fit(arch, Layout(tensor=size))
    size, said = case.refused
    with pytest.raises(UserError) as refusal:
        require_fit(arch, Layout(tensor=size))
    assert f"must divide by it, found {size}; the nearest that would do is " in str(refusal.value)
    require_fit(arch, Layout(tensor=int(str(refusal.value).split()[-1])))
    assert all(part in str(refusal.value) for part in said.split(", "))


def test_every_head_family_has_a_true_size() -> None:
    assert {head_architecture(case.config, name).family for name, case in HEAD_CASES.items()} == HEADS.keys()


@dataclass(frozen=True)
class EncoderCase:
    """`tokens`: patches that the language model sees, and `class_token` more in the encoder."""

    config: dict[str, Any]
    head_dim: int
    ffn: int
    tokens: int
    class_token: int = 0


def _siglip(hidden: int, layers: int, heads: int, ffn: int, patch: int = 16) -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": ffn,
        "image_size": 384,
        "patch_size": patch,
    }


def _huge(kind: str) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "intermediate_size": 5120,
        "image_size": 224,
        "patch_size": 14,
    }


_CLIP = {**_siglip(1024, 24, 16, 4096, patch=14), "model_type": "clip_vision_model", "image_size": 336}
_DINOV2 = {"model_type": "dinov2", "image_size": 518, "patch_size": 14}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
_GIANT = {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "use_swiglu_ffn": True}
_NAFLEX = {"model_type": "siglip2_vision_model", "num_patches": 256, "patch_size": 16}

ENCODER_CASES = {
    "SigLIP2-B/16@384": EncoderCase(_siglip(768, 12, 12, 3072), 64, 3072, 576),
    "SigLIP2-L/16@384": EncoderCase(_siglip(1024, 24, 16, 4096), 64, 4096, 576),
    "SigLIP-So400m/14@384": EncoderCase(_siglip(1152, 27, 16, 4304, patch=14), 72, 4304, 729),
    "SigLIP2-So400m/16@384": EncoderCase(_siglip(1152, 27, 16, 4304), 72, 4304, 576),
    "SigLIP2-g-opt/16@384": EncoderCase(_siglip(1536, 40, 16, 6144), 96, 6144, 576),
    "SigLIP2-B/16-naflex": EncoderCase(_NAFLEX, 64, 3072, 256),
    "CLIP-L/14-336": EncoderCase(_CLIP, 64, 4096, 576, class_token=1),
    "DINOv2-L/14@518": EncoderCase(_DINOV2 | _LARGE, 64, 4096, 1369, class_token=1),
    "DINOv2-g/14@518": EncoderCase(_DINOV2 | _GIANT, 64, 4096, 1369, class_token=1),
    "MAE-H/14@224": EncoderCase(_huge("vit_mae"), 80, 5120, 256, class_token=1),
    "ViT-H/14@224": EncoderCase(_huge("vit"), 80, 5120, 256, class_token=1),
    "MoCo-v3-B/16@224": EncoderCase({"architecture": "vit_base_patch16_224"}, 64, 3072, 196, class_token=1),
}


@pytest.mark.parametrize("name", ENCODER_CASES)
def test_encoders(name: str) -> None:
    case = ENCODER_CASES[name]
    encoder = encoder_architecture(case.config, name)
    head = head_architecture(HEAD_CASES["Qwen2.5-0.5B"].config, "x")
    arch = Architecture(encoder, head, encoder.feature_layer)
    assert (encoder.head_dim, encoder.ffn, encoder.tokens) == (case.head_dim, case.ffn, case.tokens)
    assert encoder.places == case.tokens + case.class_token
    stored = stored_shapes(case.config)
    family = ENCODERS[encoder.family]
    for part, shape in part_shapes(arch, "encoder").items():
        found = next((s for s in spellings(part, family.HF_PREFIX, family.ALIASES) if s in stored), None)
        assert found is not None, part
        assert stored.pop(found) == shape, part
    past = tuple(f"encoder.layers.{n}." for n in range(arch.encoder_layers, encoder.layers))
    assert [left for left in stored if not left.startswith((*past, *family.PAST_FEATURES))] == []


def stored_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """By the library's names; chunks of one tensor apart. timm's are those of transformers' ViT, of its default size."""
    if "architecture" not in config:
        return {name: tuple(tensor.shape) for name, tensor in library_state(config).items()}
    shapes = {}
    for name, tensor in as_timm(library_state({"model_type": "vit"})).items():
        chunks = 3 if "attn.qkv" in name else 1
        for n, chunk in enumerate(tensor.chunk(chunks)):
            shapes[f"{name}[{n}/3]" if chunks == 3 else name] = tuple(chunk.shape)
    return {name: shape for name, shape in shapes.items() if not name.startswith("pooler.")}


@pytest.mark.parametrize("family", ENCODERS.values(), ids=ENCODERS)
def test_what_the_documentation_says_a_family_has(family: ModuleType) -> None:
    """`docs/adding-an-encoder.md`, by name and arguments."""
    text = (Path(__file__).parents[2] / "docs" / "adding-an-encoder.md").read_text()
    said = re.findall(
        r"^\| `(\w+)(?:\(([\w, ]+)\))?` \|", text.partition("## 2.")[0].partition("Names` (in")[0], re.MULTILINE
    )
    assert {"HF_PREFIX", "table", "export_config"} <= {name for name, _ in said}
    for name, arguments in said:
        found = getattr(family, name)
        if arguments:
            required = [p.name for p in inspect.signature(found).parameters.values() if p.default is p.empty]
            assert required == arguments.split(", "), name


def test_every_encoder_family_has_a_true_size() -> None:
    assert {encoder_architecture(case.config, name).family for name, case in ENCODER_CASES.items()} == ENCODERS.keys()
