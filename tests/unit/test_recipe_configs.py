"""The shipped runs against the paper's settings (arXiv 2510.16333), key by key."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import TrainingArguments

from pivot_megatron.config.load import dump_config, load_config
from pivot_megatron.config.schema import RunConfig

RUNS = Path(__file__).parents[2] / "configs" / "run"
ENCODER, HEAD = "checkpoints/siglip2-so400m-patch16-384", "checkpoints/Qwen2.5-1.5B-Instruct"

# Where the paper names no value, that of the libraries it was trained with.
ADAMW = inspect.signature(torch.optim.AdamW).parameters
BETAS, EPSILON = ADAMW["betas"].default, ADAMW["eps"].default
CLIP = next(field.default for field in fields(TrainingArguments) if field.name == "max_grad_norm")

EVERY_STAGE: Mapping[str, Any] = {
    "batch.global_size": 256,
    "batch.steps": None,
    "data.sequence_length": 2048,
    "model.anyres": None,  # one square an image
    "model.encoder.feature_layer": None,  # the family's own: SigLIP's last layer but one
    "model.encoder.image_size": None,  # the checkpoint's own: 384 pixels, 576 tokens
    "model.encoder.max_patches": None,
    "model.projector.keep": "both",
    "optimizer.beta1": BETAS[0],
    "optimizer.beta2": BETAS[1],
    "optimizer.clip_gradient": CLIP,
    "optimizer.epsilon": EPSILON,
    "optimizer.minimum_learning_rate": 0.0,
    "optimizer.schedule": "cosine",
    "optimizer.warmup_fraction": 0.03,
    "optimizer.weight_decay": 0.0,
    "recompute.encoder": "full",
    "recompute.llm": "full",
    "seed": 777,
}
SFT = {"objective.kind": "sft"}
DPO = {
    "objective.kind": "dpo",
    "objective.beta": 0.1,
    "objective.label_smoothing": 0.0,
    "objective.losses.sigmoid": 1.0,
}


def stage(shards: str, template: str, epochs: int, objective: Mapping[str, Any], **other: Any) -> dict[str, Any]:
    data = {"data.shards.0.folder": f"shards/{shards}", "data.shards.0.weight": 1.0, "data.shards.0.most": None}
    return {**EVERY_STAGE, **data, "data.template": template, "batch.epochs": epochs, **objective, **other}


def starts(encoder: str, llm: str, projector: str | None) -> dict[str, str | None]:
    """`model.PART.SOURCE` of all sources: a run's name, or the folder of an untouched model; None is a fresh projector."""
    found: dict[str, str | None] = {}
    for part, start in (("encoder", encoder), ("llm", llm), ("projector", projector)):
        untouched = start in (ENCODER, HEAD)
        found[f"model.{part}.hf"] = start if untouched else None
        found[f"model.{part}.checkpoint"] = None if untouched or start is None else f"runs/{start}"
        found[f"model.{part}.fresh"] = None
    return found


STAGES: Mapping[str, Mapping[str, Any]] = {
    "1a_align": stage("llava-558k", "plain", 1, SFT, **starts(ENCODER, HEAD, None)),
    "1b_pretrain": stage("llava-onevision-single-image", "qwen_1_5", 1, SFT, **starts(ENCODER, "1a_align", "1a_align")),
    "2_dpo": stage("mmpr-20k", "qwen_1_5", 3, DPO, **starts(*["1b_pretrain"] * 3)),
    "2_sft": stage("mmpr-20k", "qwen_1_5", 3, SFT, **starts(*["1b_pretrain"] * 3)),
    "2_mpo": stage(
        "mmpr-20k",
        "qwen_1_5",
        3,
        {**DPO, "objective.losses.sigmoid": 0.8, "objective.losses.bco": 0.2, "objective.losses.sft": 1.0},
        **starts(*["1b_pretrain"] * 3),
        **{"optimizer.weight_decay": 0.05},
    ),
    "3a_reassemble_align": stage("llava-558k", "plain", 1, SFT, **starts("2_dpo", HEAD, None)),
    "3b_reassemble_tune": stage("cambrian-737k", "qwen_1_5", 1, SFT, **starts(*["3a_reassemble_align"] * 3)),
    # The appendix's "1+1" projector: the evolved one's first linear, frozen, and a new second one.
    "3a_reassemble_align_1plus1": stage(
        "llava-558k", "plain", 1, SFT, **starts("2_dpo", HEAD, "2_dpo"), **{"model.projector.keep": "first"}
    ),
    "3b_reassemble_tune_1plus1": stage(
        "cambrian-737k", "qwen_1_5", 1, SFT, **starts(*["3a_reassemble_align_1plus1"] * 3)
    ),
}
# Learning rates of encoder, projector (its second linear) and head; 0 stands still. The stage's own rate is the largest.
RATES = {
    "1a_align": (0.0, 1e-3, 0.0),
    "1b_pretrain": (2e-6, 1e-5, 1e-5),
    "2_dpo": (1e-6, 1e-6, 1e-6),
    "2_sft": (5e-6, 5e-6, 5e-6),
    "2_mpo": (2e-7, 2e-7, 2e-7),
    "3a_reassemble_align": (0.0, 1e-3, 0.0),
    "3b_reassemble_tune": (0.0, 1e-5, 1e-5),
    "3a_reassemble_align_1plus1": (0.0, 1e-3, 0.0),
    "3b_reassemble_tune_1plus1": (0.0, 1e-5, 1e-5),
}
# What changes where and how fast a run computes, or what it keeps, and what the paper is silent about.
NOT_THE_PAPERS = (
    "name",
    "out",
    "batch.micro_*",
    "checkpoints.*",
    "data.cache",
    "data.image_backend",
    "data.max_bad_share",
    "data.on_bad_sample",
    "data.too_long",
    "data.workers",
    "faults.*",
    "layout.*",
    "objective.reference",  # frozen either way: the model that the run starts from
    "precision.*",
    "tracking.*",
)
LINEARS = ("projector.encoder.linear_fc1.weight", "projector.encoder.linear_fc2.weight")
COMPARED_AS_RATES = ("optimizer.learning_rate", "parameters", "parameters.*")


def settings(config: RunConfig) -> dict[str, Any]:
    """Every value of `config` by its dotted key; of what is empty, the empty value."""
    found: dict[str, Any] = {}

    def walk(key: str, node: Any) -> None:
        if not isinstance(node, dict | list) or not node:
            found[key] = node
            return
        for name, value in node.items() if isinstance(node, dict) else enumerate(node):
            walk(f"{key}.{name}" if key else str(name), value)

    walk("", yaml.safe_load(dump_config(config)))
    return found


def rate(config: RunConfig, parameter: str) -> float:
    for rule in config.parameters:
        if fnmatchcase(parameter, rule.match):
            return 0.0 if rule.rate == "frozen" else config.optimizer.learning_rate * rule.rate
    return config.optimizer.learning_rate


def is_any(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def test_every_shipped_run_is_in_the_table() -> None:
    assert {path.stem for path in RUNS.glob("*.yaml")} == STAGES.keys() == RATES.keys()


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_as_the_paper_has_it(name: str) -> None:
    config = load_config(RUNS / f"{name}.yaml")
    found = settings(config)
    left = {key for key in found if not is_any(key, NOT_THE_PAPERS + COMPARED_AS_RATES)}
    assert left == STAGES[name].keys()
    assert {key: found[key] for key in left} == STAGES[name]
    assert (config.name, config.out) == (name, Path("runs") / name)
    assert (config.precision.compute, config.precision.fp8) == ("bf16", None)


@pytest.mark.parametrize("name", RATES)
def test_what_trains_and_how_fast(name: str) -> None:
    config = load_config(RUNS / f"{name}.yaml")
    parameters = ("encoder.decoder.layers.0.mlp.linear_fc1.weight", LINEARS[1], "llm.output_layer.weight")
    assert tuple(rate(config, parameter) for parameter in parameters) == pytest.approx(RATES[name])
    assert config.optimizer.learning_rate == max(RATES[name])


@pytest.mark.parametrize("name", RATES)
def test_the_first_linear_of_a_projector_stands_still_where_it_is_kept(name: str) -> None:
    config = load_config(RUNS / f"{name}.yaml")
    first, second = (rate(config, parameter) for parameter in LINEARS)
    assert first == (0.0 if name.endswith("1plus1") else second)


@pytest.mark.parametrize("other", ["2_sft", "2_mpo"])
def test_a_control_differs_from_dpo_in_objective_rate_and_decay_alone(other: str) -> None:
    """Also in what the paper does not say."""
    dpo, control = (load_config(RUNS / f"{name}.yaml") for name in ("2_dpo", other))
    optimizer = replace(
        control.optimizer, learning_rate=dpo.optimizer.learning_rate, weight_decay=dpo.optimizer.weight_decay
    )
    assert replace(control, name=dpo.name, out=dpo.out, objective=dpo.objective, optimizer=optimizer) == dpo


def test_three_epochs_of_20_000_pairs_are_the_papers_234_steps() -> None:
    batch = load_config(RUNS / "2_dpo.yaml").batch
    assert batch.epochs is not None and int(20_000 * batch.epochs / batch.global_size) == 234
