"""Models and batches of the GPU check, made of configs alone: nothing is downloaded, and weights are drawn on the device."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import pivot_megatron.runtime  # noqa: F401  (before megatron.core)
from pivot_megatron.config.schema import (
    Batch,
    Component,
    Data,
    Dpo,
    Encoder,
    Layout,
    Model,
    Optimizer,
    Precision,
    Recompute,
    RunConfig,
)
from pivot_megatron.convert.load import parameters_by_global_name
from pivot_megatron.data.batch import PackedBatch
from pivot_megatron.data.packing import pack
from pivot_megatron.data.tokens import Branch, Tokenized
from pivot_megatron.data.views import View
from pivot_megatron.families.registry import encoder_architecture, head_architecture
from pivot_megatron.model.composition import Architecture, Stage, build_model
from pivot_megatron.objective.build import build_objective
from pivot_megatron.objective.types import Objective
from pivot_megatron.runtime.device import current_platform
from pivot_megatron.train.optimizer import Optimization, apply_rules, build_optimization, wrap


def architecture(encoder: dict[str, Any], head: dict[str, Any]) -> Architecture:
    siglip = {"model_type": "siglip_vision_model", "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", **encoder}
    qwen = {
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        **head,
    }
    return Architecture(encoder_architecture(siglip, "encoder"), head_architecture(qwen, "head"), -2)


def sizes(hidden: int, layers: int, heads: int, ffn: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": ffn,
    }


SO400M = sizes(1152, 27, 16, 4304) | {"image_size": 384}
QWEN_05B = sizes(896, 24, 14, 4864) | {"num_key_value_heads": 2, "vocab_size": 151936}
QWEN_15B = sizes(1536, 28, 12, 8960) | {"num_key_value_heads": 2, "vocab_size": 151936}

# Seconds a step where models of true size take longer, and widths that every recipe takes.
MIDDLE = architecture(
    sizes(768, 7, 12, 3072) | {"image_size": 224},
    sizes(896, 8, 14, 4864) | {"num_key_value_heads": 2, "vocab_size": 8192},
)
# For machines without a GPU: says that this code runs, and nothing else.
TINY = architecture(
    sizes(96, 3, 4, 176) | {"image_size": 32}, sizes(64, 4, 4, 128) | {"num_key_value_heads": 2, "vocab_size": 320}
)


def offered(precisions: Mapping[str, Precision], elsewhere: str) -> dict[str, Precision]:
    """Those of a GPU that this machine has; on a CPU fp32 alone, under the name `elsewhere`."""
    platform = current_platform()
    if not platform.is_cuda:
        return {elsewhere: Precision("fp32")}
    return {name: p for name, p in precisions.items() if p.fp8 is None or platform.transformer_engine}


@torch.no_grad()
def draw_weights(model: Stage, seed: int) -> None:
    """The same for the same names, whatever classes the layers are of: norms one, biases zero, the rest normal (0.02)."""
    generator = torch.Generator(current_platform().device).manual_seed(seed)
    for name, parameter in sorted(parameters_by_global_name(model), key=lambda named: named[0]):
        if parameter.dim() > 1:
            parameter.normal_(0.0, 0.02, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def built(arch: Architecture, precision: Precision, seed: int = 1) -> Stage:
    model = build_model(arch, Layout(), precision, Recompute())
    draw_weights(model, seed)
    return model


@dataclass(frozen=True)
class Trainee:
    """`wrapped` is the model in megatron-core's data-parallel wrapper."""

    wrapped: list[Any]
    optimization: Optimization
    objective: Objective


def run_config(precision: Precision, steps: int, learning_rate: float, out: Path = Path("unused")) -> RunConfig:
    nowhere = Path("unused")
    return RunConfig(
        name="gpu-check",
        out=out,
        model=Model(encoder=Encoder(hf=nowhere), llm=Component(hf=nowhere)),
        objective=Dpo(),
        data=Data(shards=()),
        optimizer=Optimizer(learning_rate=learning_rate, schedule="constant", warmup_fraction=0.0),
        batch=Batch(global_size=1, micro_tokens=1, steps=steps),
        precision=precision,
    )


def trainee(model: Stage, precision: Precision, steps: int, learning_rate: float) -> Trainee:
    config = run_config(precision, steps, learning_rate)
    apply_rules(model, ())
    model.train()
    wrapped = wrap(model, config.layout)
    return Trainee(wrapped, build_optimization(wrapped, config, steps), build_objective(config.objective))


def pairs(arch: Architecture, count: int, prompt: int, answer: int, seed: int) -> list[Tokenized]:
    """Of random words: a square image and `prompt` words, and two answers of `answer` words, give or take a third."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, arch.head.vocabulary, (length,), generator=generator).tolist())

    def around(length: int) -> int:
        return length + int(torch.randint(-(length // 3), length // 3 + 1, (1,), generator=generator))

    view = View.of_patches(arch.encoder.grid, arch.encoder.grid)
    found = []
    for n in range(count):
        prefix = (*ids(2), *[0] * view.tokens, *ids(around(prompt)))
        branches = tuple(Branch(a, (True,) * len(a)) for a in (ids(around(answer)), ids(around(answer))))
        found.append(Tokenized(f"pair-{seed}-{n}", prefix, branches, (2,), (view,)))
    return found


def batch_of(arch: Architecture, samples: Sequence[Tokenized], multiple: int, seed: int) -> PackedBatch:
    edge = arch.encoder.image_size
    generator = torch.Generator().manual_seed(seed)
    pixels = [torch.randn(1, 3, edge, edge, generator=generator) for _ in samples]
    return pack(list(samples), pixels, 2, multiple)


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    a, b = found.detach().double().cpu(), wanted.detach().double().cpu()
    return float((a - b).norm() / b.norm().clamp_min(1e-30)) if a.isfinite().all() else math.nan
