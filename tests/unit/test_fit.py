"""Layouts that a model cannot be cut by are refused by name, with the nearest that would do."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from pivot_megatron.cli import main
from pivot_megatron.config.schema import Fp8, Layout, Precision
from pivot_megatron.convert.tiny_checkpoints import make_encoder, make_head, make_tokenizer
from pivot_megatron.errors import UserError
from pivot_megatron.model import specs
from pivot_megatron.model.fit import misfits, require_fit
from tests.plans import HEADS, SO400M, model

BASE = {**SO400M, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
QWEN_7B = HEADS["7B"]


@pytest.mark.parametrize(
    ("encoder", "layout", "said", "nearest"),
    [
        (BASE, {"tensor": 8}, "encoder heads (12), LLM heads (28) must divide by it, found 8", {"tensor": 4}),
        (SO400M, {"tensor": 3}, "encoder heads (16)", {"tensor": 4}),
        (SO400M, {"pipeline": 8}, "28 layers do not fall evenly on 8 stages", {"pipeline": 7}),
        (
            SO400M,
            {"pipeline": 4, "first_stage_layers": 5},
            "28 layers do not fall evenly on 4 stages with first_stage_layers 5",
            {"first_stage_layers": 4},
        ),
        (
            SO400M,
            {"pipeline": 4, "virtual_pipeline": 2},
            "a stage's 7 LLM layers do not divide by virtual_pipeline 2",
            {"virtual_pipeline": 1},
        ),
        (SO400M, {"pipeline": 40}, "28 layers do not fall evenly on 40 stages", {"pipeline": 28}),
        (
            SO400M,
            {"pipeline": 2, "first_stage_layers": 30},
            "28 layers do not fall evenly on 2 stages with first_stage_layers 30",
            {"first_stage_layers": 27},
        ),
        (
            SO400M,
            {"pipeline": 2, "virtual_pipeline": 2, "first_stage_layers": 12, "last_stage_layers": 16},
            "one of first_stage_layers and last_stage_layers says what both stages have",
            {"virtual_pipeline": 1},
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(
    encoder: dict[str, Any], layout: dict[str, int], said: str, nearest: dict[str, int]
) -> None:
    arch, wanted = model(encoder, QWEN_7B), Layout(**layout)
    (line,) = misfits(arch, wanted)
    assert said in line
    told = line.split("the nearest that would do is ")[1]
    found = (
        {"tensor": int(told)} if told.isdigit() else {k: int(n) for k, n in re.findall(r"layout\.(\w+) (\d+)", told)}
    )
    assert found == nearest
    require_fit(arch, replace(wanted, **found))  # type: ignore[arg-type]


def test_every_reason_is_told_at_once() -> None:
    with pytest.raises(UserError) as refusal:
        require_fit(model(BASE, QWEN_7B), Layout(tensor=8, pipeline=8))
    assert [line.split(":")[0] for line in str(refusal.value).splitlines()] == ["layout.tensor", "layout.pipeline"]


def test_what_fits_is_not_refused() -> None:
    arch = model(SO400M, QWEN_7B)
    for layout in (
        Layout(),
        Layout(tensor=4, pipeline=7),
        Layout(pipeline=2, virtual_pipeline=7),
        Layout(pipeline=4, first_stage_layers=4, last_stage_layers=8),
        Layout(pipeline=4, first_stage_layers=4, virtual_pipeline=4),
    ):
        assert misfits(arch, layout) == []


SMALL = {**QWEN_7B, "num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 256, "intermediate_size": 512}


@pytest.mark.parametrize(
    ("head", "layout", "fp8", "said"),
    [
        ({}, {}, Fp8("tensorwise"), None),
        ({}, {"tensor": 4}, Fp8("blockwise"), None),
        # 40 channels a rank: fine in bf16, no multiple of 16.
        (
            {"head_dim": 20},
            {"tensor": 2},
            Fp8("tensorwise", encoder=False),
            "precision.fp8.llm: FP8 needs widths of a tensor-parallel rank that divide by 16, found query, key and value 120, "
            "attention 40; the nearest that would do is layout.tensor 1",
        ),
        ({"head_dim": 20}, {"tensor": 2}, Fp8("tensorwise", llm=False), None),
        (
            {"intermediate_size": 520},
            {},
            Fp8("delayed"),
            "precision.fp8.llm: FP8 needs widths of a tensor-parallel rank that divide by 16, found FFN 520; "
            "the nearest that would do is precision.fp8.llm false",
        ),
        # megatron-core takes at most a stage's layers.
        (
            {},
            {"pipeline": 7},
            Fp8("tensorwise", first_layers_bf16=5),
            "precision.fp8.first_layers_bf16: expected at most 4 of the llm's 28 layers (an even share of a pipeline stage), "
            "found 5",
        ),
        (
            {},
            {},
            Fp8("tensorwise", first_layers_bf16=20, last_layers_bf16=8, encoder=False),
            "precision.fp8: 28 layers kept in bf16 leave none of the llm's 28 in FP8; keep 27 at most, or set "
            "precision.fp8.llm: false",
        ),
    ],
)
def test_what_fp8_cannot_compute_is_refused_with_what_would(
    head: dict[str, int], layout: dict[str, int], fp8: Fp8, said: str | None
) -> None:
    arch = model(SO400M, SMALL)
    arch = replace(arch, head=replace(arch.head, **{RENAMED.get(k, k): v for k, v in head.items()}))
    found = misfits(arch, Layout(**layout), Precision("bf16", fp8))
    assert found == ([said] if said else [])
    assert misfits(arch, Layout(**layout)) == []


RENAMED = {"intermediate_size": "ffn"}


@pytest.mark.parametrize("part", ["encoder", "llm"])
def test_megatron_core_takes_as_many_layers_in_bf16_as_check_does(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own bound, which it states as it builds a config."""
    monkeypatch.setattr(specs, "require_fp8", lambda _: None)
    arch, layout = model(SO400M, SMALL), Layout(pipeline=4)
    layers = {"encoder": arch.encoder_layers, "llm": arch.head.layers // 4}[part]
    for kept, fits in ((layers, True), (layers + 1, False)):
        fp8 = Fp8("tensorwise", encoder=part == "encoder", llm=part == "llm", first_layers_bf16=kept)
        precision = Precision("bf16", fp8)
        ours = not any("first_layers_bf16" in line for line in misfits(arch, layout, precision))
        with nullcontext() if fits else pytest.raises(ValueError, match="num_layers_at_start_in_bf16"):
            if part == "encoder":
                specs.encoder_config(arch.encoder, arch.encoder_layers, layout, precision)
            else:
                specs.head_config(arch.head, layout, precision)
        assert ours == fits


def test_check_holds_the_layout_against_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the folders that the run starts from, every reason at once; FP8 is refused where nothing computes in it."""
    make_encoder(tmp_path / "e", image_size=32, patch_size=8, hidden_size=64, layers=2, heads=4, ffn=64, seed=1)
    tokenizer = make_tokenizer(["a word"], 300)
    make_head(tmp_path / "l", tokenizer, hidden_size=64, layers=4, heads=4, kv_heads=2, ffn=64, tied=True, seed=2)
    tree = {
        "name": "n",
        "out": str(tmp_path / "out"),
        "model": {"encoder": {"hf": str(tmp_path / "e")}, "llm": {"hf": str(tmp_path / "l")}},
        "objective": {"kind": "dpo"},
        "data": {"shards": ["s"]},
        "optimizer": {"learning_rate": 1e-6},
        "batch": {"global_size": 8, "micro_tokens": 4096, "epochs": 3},
        "layout": {"tensor": 4, "pipeline": 2, "virtual_pipeline": 2},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert main(["check", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: ok\n"
    path.write_text(
        yaml.safe_dump({**tree, "layout": {"tensor": 3, "pipeline": 3}, "precision": {"fp8": "tensorwise"}})
    )
    assert main(["check", str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    wanted = ("layout.tensor: encoder heads (4)", "layout.pipeline: the LLM's 4 layers", "precision.fp8: needs a CUDA")
    assert all(line.startswith(f"{path}: {start}") for line, start in zip(lines, wanted, strict=True))
