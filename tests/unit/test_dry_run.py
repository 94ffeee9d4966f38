"""A dry run builds what a run builds, in no memory, and names what differs from what plans count with."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from pivot_megatron.config.schema import (
    Component,
    Encoder,
    Fp8,
    Layout,
    Model,
    ParameterRule,
    Precision,
    Recompute,
    Sft,
)
from pivot_megatron.convert.load import parameters_by_global_name
from pivot_megatron.convert.plan import parameter_shape
from pivot_megatron.errors import RunError, UserError
from pivot_megatron.families.registry import encoder_architecture
from pivot_megatron.model.composition import Architecture, build_model
from pivot_megatron.plan import dry_run as parent
from pivot_megatron.plan import parameters, rehearsal
from pivot_megatron.plan.dry_run import DryRun, build_of, dry_run
from pivot_megatron.plan.rehearsal import Build, Facts, StageFound, compared, rehearse
from pivot_megatron.plan.stages import Chunk
from pivot_megatron.runtime.distributed import process_groups
from pivot_megatron.runtime.pretended import pretended_rank
from tests import matrix
from tests.parity.training_jobs import run_config
from tests.plans import HEADS, MAE_BASE, SO400M, TINY, TINY_UNTIED, model

MATRIX = [entry for entry in vars(matrix).values() if isinstance(entry, tuple) and isinstance(entry[0], str)]
QWEN3 = dataclasses.replace(TINY_UNTIED.head, family="qwen3", qkv_bias=False, qk_norm=True)
_MAE = MAE_BASE | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MAE_QWEN3 = Architecture(encoder_architecture(_MAE, "encoder"), QWEN3, -1)
_PLAIN = (Layout(), Precision(), Recompute())
FROZEN = (ParameterRule("encoder.*", "frozen"), ParameterRule("llm.decoder.layers.1.*", 0.5))


def found(stages: tuple[StageFound, ...]) -> list[str]:
    return [difference for stage in stages for difference in stage.differences]


@matrix.layouts(*MATRIX)
@pytest.mark.parametrize("arch", [TINY, TINY_UNTIED, MAE_QWEN3], ids=["tied", "untied", "mae, qwen3"])
def test_every_layout_builds_what_is_planned(arch: Architecture, layout: Layout, world: int) -> None:
    stages = rehearse(Build(arch, layout, world, Precision("fp32"), Recompute("selective", "full"), FROZEN))
    assert found(stages) == []
    assert [rank for stage in stages for rank in stage.ranks] == list(range(world))
    assert all(stage.training > 0 for stage in stages) and stages[0].training < stages[0].parameters


def test_no_rank_between_the_first_and_the_last_has_anything_of_its_own() -> None:
    build = Build(TINY, Layout(tensor=4, pipeline=2), 16)
    for stage in rehearse(build):
        held = {rank: rehearsal._rank(build, stage.chunks, rank) for rank in stage.ranks}
        assert all(one == held[stage.ranks[0]] and not one[1] for one in held.values())


def test_counts_and_bytes_are_those_of_a_model_in_memory() -> None:
    (stage,) = rehearse(Build(TINY, Layout(), 1, rules=FROZEN))
    with process_groups(Layout(), seed=1):
        real = {name: p.numel() for name, p in parameters_by_global_name(build_model(TINY, *_PLAIN))}
    assert stage.parameters == sum(real.values()) and stage.weight_bytes == 2 * stage.parameters
    assert stage.training == sum(count for name, count in real.items() if not name.startswith("encoder."))


def test_a_pretended_rank_has_its_place_and_leaves_nothing() -> None:
    layout = Layout(tensor=2, pipeline=2)
    for rank, place in {0: (0, 0, 0), 1: (1, 0, 0), 2: (0, 1, 0), 11: (1, 1, 1)}.items():
        with pretended_rank(layout, rank, 16):
            assert dist.get_world_size() == 16
            assert parallel_state.get_tensor_model_parallel_rank() == place[0]
            assert parallel_state.get_data_parallel_rank() == (rank % 8) // 2
            assert parallel_state.get_pipeline_model_parallel_rank() == rank // 8
            assert torch.empty(2, device="cpu").is_meta and torch.ones(3).to(torch.device("cpu")).is_meta
        assert not dist.is_initialized() and not parallel_state.is_initialized()
        assert torch.ones(1).sum() == 1


TRUE_SIZES = {
    "0.5B": [
        Layout(),
        Layout(tensor=2),
        Layout(pipeline=4, virtual_pipeline=2),
        Layout(pipeline=2, first_stage_layers=8),
    ],
    "1.5B": [Layout(tensor=4), Layout(tensor=2, pipeline=2), Layout(pipeline=4, first_stage_layers=4)],
    "7B": [Layout(tensor=4), Layout(tensor=4, pipeline=4), Layout(tensor=2, pipeline=2, virtual_pipeline=7)],
}


@pytest.mark.parametrize("size", TRUE_SIZES)
def test_true_sizes_build_what_is_planned(size: str) -> None:
    for layout in TRUE_SIZES[size]:
        stages = rehearse(Build(model(SO400M, HEADS[size]), layout, 2 * layout.model_parallel_size))
        assert found(stages) == [], layout


@pytest.fixture
def planting(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """What is planted in whole parameters is not kept for other tests."""
    parameters._parameters.cache_clear()
    yield monkeypatch
    parameters._parameters.cache_clear()


def test_a_wrong_padding_is_named(planting: pytest.MonkeyPatch) -> None:
    def unpadded(arch: Architecture, name: str) -> tuple[int, ...]:
        shape = parameter_shape(arch, name)
        return (arch.head.vocabulary, *shape[1:]) if name.endswith("word_embeddings.weight") else shape

    planting.setattr(parameters, "parameter_shape", unpadded)
    words = "llm.embedding.word_embeddings.weight"
    differs = f"{words}: expected [150, 64] bfloat16, trains, found [192, 64] bfloat16, trains"
    stages = rehearse(Build(TINY, Layout(tensor=2, pipeline=2), 8))
    assert found(stages) == [f"rank {rank}: {differs}" for rank in (0, 3, 4, 7)]


def test_a_wrong_place_is_named(planting: pytest.MonkeyPatch) -> None:
    one_by_one = [
        Chunk(s, c, range(2 * s + c, 2 * s + c + 1), s == c == 0, s == c == 1) for s in (0, 1) for c in (0, 1)
    ]
    planting.setattr(rehearsal, "chunks", lambda *_: one_by_one)
    told = found(rehearse(Build(TINY, Layout(pipeline=2, virtual_pipeline=2), 2)))
    assert "rank 0: chunk 1: expected LLM layers [1], found [2]" in told
    norm = "input_layernorm.weight"
    assert f"rank 0: llm.decoder.layers.1.{norm}: expected [64] bfloat16, trains, found none" in told
    assert f"rank 0: llm.decoder.layers.2.{norm}: expected none, found [64] bfloat16, trains" in told


def test_what_trains_against_the_rules_is_named(planting: pytest.MonkeyPatch) -> None:
    planting.setattr(parameters, "_trains", lambda *_: True)
    told = found(rehearse(Build(TINY, Layout(), 1, rules=FROZEN)))
    assert len(told) > 10 and all("trains, found" in one and one.endswith("frozen") for one in told)


def test_another_type_is_named() -> None:
    bf16, fp32 = (Facts((2, 3), dtype, True) for dtype in (torch.bfloat16, torch.float32))
    assert list(compared({"a": bf16, "b": bf16}, {"a": bf16, "b": fp32})) == [
        "b: expected [2, 3] bfloat16, trains, found [2, 3] float32, trains"
    ]


def test_what_cannot_be_built_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise AssertionError("no such layout\nmore of it")

    monkeypatch.setattr(rehearsal, "build_model", refused)
    (stage,) = rehearse(Build(TINY, Layout(), 1))
    assert stage.differences == ("rank 0: expected a model, found AssertionError: no such layout",)
    assert stage.parameters == 0 and not dist.is_initialized()


def test_a_process_of_its_own_finds_the_same() -> None:
    build = Build(model(SO400M, HEADS["7B"]), Layout(4, 2), 16, Precision(fp8=Fp8("blockwise")), rules=FROZEN)
    run = dry_run(build)
    assert run.passed and run.stages == rehearse(build)
    title, _, first, second, how, end = run.table().splitlines()
    assert title == "16 processes: tensor 4 x pipeline 2 x data 2"
    assert first.split()[:3] == ["0", "0-7", "0-13"] and second.split()[:3] == ["1", "8-15", "14-27"]
    assert "FP8, which is left out" in how and end.endswith("as planned on every rank.")


def test_many_differences_are_shown_in_part() -> None:
    (stage,) = rehearse(Build(TINY, Layout(), 1))
    told = DryRun(Build(TINY, Layout(), 1), (dataclasses.replace(stage, differences=tuple(map(str, range(50)))),))
    assert not told.passed and told.table().splitlines()[-2:] == ["19", "and 30 more"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"layout": Layout(tensor=3)}, r"layout\.tensor: encoder heads \(4\)"),
        ({"layout": Layout(pipeline=3)}, r"layout\.pipeline: the LLM's 4 layers do not fall evenly on 3 stages"),
        ({"layout": Layout(2, 2), "gpus": 6}, r"gpus: tensor 2 x pipeline 2 needs a multiple of 4, found 6"),
        ({"gpus": 0}, r"gpus: .* found 0"),
        ({"rules": (ParameterRule("vision.*", "frozen"),)}, r"parameters\.0\.match: no parameter is named like"),
    ],
)
def test_wrong_builds_are_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        dry_run(dataclasses.replace(Build(TINY, Layout(), 1), **changed))


def test_a_process_that_ends_badly_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parent, "_CHILD", "raise SystemExit('killed')")
    with pytest.raises(RunError, match="dry run: its process ended with 1: killed"):
        dry_run(Build(TINY, Layout(), 1))


@pytest.mark.parametrize("source", ["hf", "fresh"])
def test_folders_need_a_config_alone(source: str, tmp_path: Path) -> None:
    for name, config in (("encoder", SO400M), ("llm", HEADS["72B"])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    start = Model(Encoder(**{source: tmp_path / "encoder"}), Component(**{source: tmp_path / "llm"}))
    config = dataclasses.replace(run_config(Layout(tensor=8, pipeline=8), tmp_path, tmp_path, Sft()), model=start)
    build = build_of(config)
    assert build.arch == model(SO400M, HEADS["72B"]) and build.gpus == 64
    assert build_of(config, 512).gpus == 512


_LARGE = """
import os, resource
from pivot_megatron.config.schema import Layout
from pivot_megatron.plan.dry_run import dry_run
from pivot_megatron.plan.rehearsal import Build
from pivot_megatron.runtime.memory import peak_resident
from tests.parity.training_jobs import run_config
from tests.plans import HEADS, SO400M, model
run = dry_run(Build(model(SO400M, HEADS["72B"]), Layout(tensor=8, pipeline=8, virtual_pipeline=5), 512))
# getrusage's own would be that of the process that started this one, if it was larger.
print(run.passed, max(peak_resident(os.getpid()), 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
"""


@pytest.mark.slow
def test_72b_on_512_gpus_takes_little_memory() -> None:
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", _LARGE], capture_output=True, text=True, check=True)
    passed, peak = done.stdout.split()
    assert passed == "True" and int(peak) < 4 << 30
    assert time.monotonic() - began < 120
