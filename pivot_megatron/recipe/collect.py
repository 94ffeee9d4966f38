"""What the demo's folder holds, gathered into the records of its report."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open

from pivot_megatron.config.schema import RunConfig
from pivot_megatron.recipe.demo_folder import Demo
from pivot_megatron.recipe.held_out import HeldOut, is_right
from pivot_megatron.recipe.record import Example
from pivot_megatron.recipe.run_facts import run_told


def examples(pairs: Sequence[HeldOut], answers: Mapping[str, Sequence[str]], a_task: int) -> list[Example]:
    """The first held-out questions of each task: chosen before anyone saw an answer. `answers`: by model, as `pairs`."""
    shown: list[Example] = []
    for task in dict.fromkeys(pair.task for pair in pairs):
        places = [i for i, pair in enumerate(pairs) if pair.task == task][:a_task]
        shown += [_example(pairs[i], {model: texts[i] for model, texts in answers.items()}) for i in places]
    return shown


def _example(pair: HeldOut, answers: Mapping[str, str]) -> Example:
    right = [model for model, answer in answers.items() if is_right(answer, pair.label)]
    return Example(pair.task, _png(pair.image), pair.question, pair.chosen, answers, right)


def _png(image: bytes) -> str:
    file = io.BytesIO()
    Image.open(io.BytesIO(image)).convert("RGB").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def setting_facts(demo: Demo, configs: Mapping[str, RunConfig]) -> dict[str, str]:
    """What was made, and how each run trained."""
    scale = demo.scale
    tokens = (scale.image_size // scale.patch_size) ** 2
    facts = {
        "training data": f"{scale.captions} captions, {scale.instruct} instructions, {scale.pairs} pairs",
        "held out": f"{scale.held_out} pairs, of another seed",
        "images": f"{scale.image_size} pixels a side, {tokens} tokens",
        "encoder": f"{scale.encoder_layers} layers of {scale.hidden}, {_parameters(demo.encoder)} parameters",
        "head": f"{scale.head_layers} layers of {scale.hidden}, {_parameters(demo.llm)} parameters",
        "trained layers of the encoder": f"{scale.encoder_layers - 1}; the last one is past the features that the head reads",
        "processes": str(demo.processes),
        "seed": str(scale.seed),
    }
    return facts | {f"run {name}": run_told(config) for name, config in configs.items()}


def _parameters(folder: Path) -> str:
    with safe_open(folder / "model.safetensors", "pt") as weights:
        shapes: list[Any] = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
    return f"{sum(torch.Size(shape).numel() for shape in shapes) / 1e6:.2f} M"
