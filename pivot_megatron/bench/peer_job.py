"""One training job said once, for either trainer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pivot_megatron.bench.flops import PairLengths
from pivot_megatron.bench.world import World
from pivot_megatron.convert.store import describe
from pivot_megatron.data.build import load_tokenizer
from pivot_megatron.data.chat import qwen_1_5, render
from pivot_megatron.data.order import Order
from pivot_megatron.data.pair_set import PairSet
from pivot_megatron.data.sample import Sample
from pivot_megatron.data.tokens import SampleTokenizer

_SEQUENCE_LENGTH = 2048
_TRL_NAMES = {"bco": "bco_pair"}


@dataclass(frozen=True)
class Setting:
    """AdamW (0.9, 0.999, 1e-8) without weight decay, a constant learning rate, no activation recomputed.

    `micro_batch`: pairs in one forward pass; gradients add up over a step's. `losses`: weight by name, as in a run's config.
    `clip`: gradient norm. `seed` gives the order of the pairs. `precision`: of products; weights and optimizer states are fp32.
    `threads`: of a process on the CPU, its share of the cores where left out. `trl_attention`: transformers' name for what TRL's
    model attends by.
    """

    steps: int
    pairs_a_step: int
    micro_batch: int = 1
    learning_rate: float = 1e-6
    beta: float = 0.1
    losses: Mapping[str, float] = field(default_factory=lambda: {"sigmoid": 1.0})
    label_smoothing: float = 0.0
    clip: float = 1.0
    seed: int = 777
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: int | None = None
    trl_attention: Literal["sdpa", "flash_attention_2"] = "sdpa"


def pivot_config(world: World, setting: Setting, out: Path) -> dict[str, Any]:
    """The tree of a run's YAML."""
    return {
        "name": "pivot",
        "out": str(out),
        "model": {part: {"checkpoint": str(world.checkpoint)} for part in ("encoder", "projector", "llm")},
        "objective": {
            "kind": "dpo",
            "beta": setting.beta,
            "label_smoothing": setting.label_smoothing,
            "losses": dict(setting.losses),
        },
        "data": {"shards": [str(world.pairs)], "sequence_length": _SEQUENCE_LENGTH, "image_backend": "pil"},
        "optimizer": {
            "learning_rate": setting.learning_rate,
            "schedule": "constant",
            "warmup_fraction": 0.0,
            "clip_gradient": setting.clip,
        },
        "batch": {
            "global_size": setting.pairs_a_step,
            "steps": setting.steps,
            "micro_tokens": setting.micro_batch * _SEQUENCE_LENGTH,
            "micro_images": setting.micro_batch,
        },
        "layout": {"cpu_threads": setting.threads},
        "precision": {"compute": setting.precision},
        "checkpoints": {"every": setting.steps, "keep": 1},
        "seed": setting.seed,
    }


def trl_job(world: World, setting: Setting, out: Path) -> dict[str, Any]:
    """What `trl_runner.py` reads. Writes the pairs and their images below `out`."""
    return {
        **asdict(setting),
        "losses": {_TRL_NAMES.get(name, name): weight for name, weight in setting.losses.items()},
        "model": str(world.llava),
        "pairs": str(write_pairs_in_order(world, setting, out)),
        "metrics": str(out / "metrics.jsonl"),
        "environment": str(out / "environment.json"),
        "scratch": str(out / "scratch"),
    }


def samples_by_step(world: World, setting: Setting) -> list[list[Sample]]:
    """The pairs of the setting's steps, in the order our loader gives them."""
    samples = PairSet.open([world.pairs])
    order = Order(np.arange(len(samples)), setting.seed)
    return [[samples.read(index) for index in order.batch(step, setting.pairs_a_step)] for step in range(setting.steps)]


def pair_lengths(world: World, setting: Setting) -> list[list[PairLengths]]:
    """Of every step's pairs."""
    tokenizer = load_tokenizer(world.llm)
    tokenize = SampleTokenizer(
        tokenizer=tokenizer,
        template=qwen_1_5,
        view=describe(world.checkpoint).image_views().fixed,
        sequence_length=_SEQUENCE_LENGTH,
        branches=2,
        too_long="drop",
    )

    def lengths(sample: Sample) -> PairLengths:
        tokenized = tokenize(sample)
        chosen, rejected = tokenized.branches
        scored = sum(chosen.loss) + sum(rejected.loss)
        return PairLengths(len(tokenized.prefix), len(chosen.ids), len(rejected.ids), scored)

    return [[lengths(sample) for sample in step] for step in samples_by_step(world, setting)]


def write_pairs_in_order(world: World, setting: Setting, out: Path) -> Path:
    """The pairs as JSON lines of `image` (a file), `prompt`, `chosen`, `rejected`: the texts our tokenizer sees, chat
    template and all."""
    rows = []
    for sample in (sample for step in samples_by_step(world, setting) for sample in step):
        image = out / "images" / f"{sample.key}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(sample.image or b"")
        rendered = render(sample, qwen_1_5)
        chosen, rejected = ("".join(span.text for span in branch) for branch in rendered.branches)
        rows.append({"image": str(image), "prompt": rendered.prefix, "chosen": chosen, "rejected": rejected})
    path = out / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
