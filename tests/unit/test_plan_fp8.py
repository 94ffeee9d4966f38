"""What FP8 changes in a plan: copies of weights, inputs kept in a byte, layers that stay in bf16, and the peak that is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pivot_megatron.config.schema import Batch, Fp8, Layout, ParameterRule, Precision, Recompute
from pivot_megatron.plan.estimate import Estimate, Subject, estimate
from pivot_megatron.plan.explain import arithmetic
from pivot_megatron.plan.hardware import gpu
from pivot_megatron.plan.layer_work import Numbers
from pivot_megatron.plan.memory import kept_bytes
from pivot_megatron.plan.model_work import Model, encoder_layer, head_layer
from pivot_megatron.plan.plan import Plan
from pivot_megatron.plan.subject import Planned
from pivot_megatron.plan.text import facts
from pivot_megatron.plan.workload import Lengths, Pack
from tests.plans import HEADS, SO400M, model

ARCH = model(SO400M, HEADS["7B"])
PAIR = Lengths(624, (200, 200), 400, 1, 576)
# Weights of the linears of one layer: 28 heads and 4 groups of 128 by 3584, gated 18944; 16 heads of 72, 4352 padded.
HEAD = 3584 * (28 + 2 * 4) * 128 + 3584 * 28 * 128 + 3 * 3584 * 18944
ENCODER = 4 * 1152 * 1152 + 2 * 1152 * 4352


def planned(fp8: Fp8 | None, layout: Layout | None = None, machine: str = "h100", **more: Any) -> Estimate:
    batch = Batch(8, 8192, steps=10)
    subject = Subject(ARCH, Precision(fp8=fp8), Recompute("none", "none"), (), batch, (PAIR,) * 8, 10)
    return estimate(replace(subject, **more), layout or Layout(), 8, gpu(machine))


@pytest.mark.parametrize(
    ("fp8", "machine", "each"),
    [
        (Fp8("tensorwise"), "h100", 2),
        (Fp8("delayed"), "h200", 2),
        (Fp8("tensorwise"), "b200", 1),  # whose products read a weight along either side
        (Fp8("blockwise"), "b200", 2),
    ],
)
def test_weights_of_linears_have_copies_in_fp8(fp8: Fp8, machine: str, each: int) -> None:
    (stage,) = planned(fp8, machine=machine).stages
    assert stage.memory.copies == each * (28 * HEAD + 26 * ENCODER)
    assert planned(None).stages[0].memory.copies == 0


def test_a_frozen_encoder_needs_none_transposed() -> None:
    (stage,) = planned(Fp8("tensorwise"), rules=(ParameterRule("encoder.*", "frozen"),)).stages
    assert stage.memory.copies == 2 * 28 * HEAD + 26 * ENCODER


def test_layers_that_stay_in_bf16_are_those_of_their_stages() -> None:
    fp8 = Fp8("tensorwise", encoder=False, first_layers_bf16=3, last_layers_bf16=1)
    found = planned(fp8, Layout(pipeline=4)).stages
    assert [stage.memory.copies / (2 * HEAD) for stage in found] == [4, 7, 7, 6]
    whole, none = planned(Fp8("tensorwise", encoder=False), Layout(pipeline=4)), planned(None, Layout(pipeline=4))
    kept = [one.memory.activations for one in found]
    lowest, highest = ([one.memory.activations for one in other.stages] for other in (whole, none))
    assert kept[1:3] == lowest[1:3] and kept[0] - lowest[0] == pytest.approx((highest[0] - lowest[0]) * 3 / 7)
    assert lowest[3] < kept[3] < highest[3]


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_inputs_of_linears_are_kept_in_a_byte(mode: Any) -> None:
    """Of two streams behind norms, and of what goes into the MLP's second linear; attention keeps its own output."""
    for layer, wide in ((head_layer(ARCH.head), 18944), (encoder_layer(ARCH.encoder), 4352)):
        plain, tensorwise, delayed = (
            kept_bytes(layer, Numbers("bf16", 1, True, recipe), 1000, 1000, mode)
            for recipe in (None, "tensorwise", "delayed")
        )
        assert plain - tensorwise == 1000 * (2 * layer.hidden + wide)
        # Its own cast of attention's output: beside it, or, where attention is made anew, in its place.
        assert delayed - tensorwise == 1000 * layer.query_width(1) * (1 if mode == "none" else -1)
    full = [kept_bytes(layer, Numbers("bf16", 1, True, recipe), 1000, 1000, "full") for recipe in (None, "tensorwise")]
    assert full[0] == full[1]


@pytest.mark.parametrize("layout", [Layout(), Layout(pipeline=2)])
def test_products_are_in_fp8_where_layers_are(layout: Layout) -> None:
    fp8 = Fp8("tensorwise", first_layers_bf16=2, last_layers_bf16=1)
    found = planned(fp8, layout)
    pack = Pack((PAIR,), 16)
    flops: dict[str, float] = {}
    for stage in range(layout.pipeline):
        for chunk, weights in zip(found.chunks_of(stage), found.stages[stage].weights, strict=True):
            for op in found.model.work(chunk, pack, weights).forward["head"]:
                if op.name in ("qkv", "proj", "fc1", "fc2"):
                    flops[op.dtype] = flops.get(op.dtype, 0.0) + op.flops
    assert flops["fp8"] == pytest.approx(25 * 2 * 1024 * HEAD)
    mlp = 3 * 3584 * 18944
    assert flops["bf16"] == pytest.approx(2 * 2 * 1024 * HEAD + 2 * (1024 * (HEAD - mlp) + 400 * mlp))


def test_fewer_layers_in_fp8_take_longer_also_in_alike_chunks() -> None:
    seconds = [
        planned(Fp8("tensorwise", first_layers_bf16=kept), Layout(pipeline=2)).step_seconds for kept in (0, 4, 14)
    ]
    assert seconds == sorted(seconds) and len(set(seconds)) == 3


def test_kinds_of_layers_are_told_apart() -> None:
    precision = Precision(fp8=Fp8("delayed", llm=False))
    whole = Model(ARCH, Layout(), precision, Recompute(), True)
    assert whole.kinds("llm") == [(Numbers("bf16", 1, True), 28)]
    assert whole.kinds("encoder", range(2, 5)) == [(Numbers("bf16", 1, True, "delayed"), 3)]
    assert whole.numbers().gemm == "bf16" and Numbers("bf16", 1, True, "delayed").gemm == "fp8"


def test_a_plan_says_what_is_in_fp8_and_what_mfu_is_of() -> None:
    def told(fp8: Fp8 | None) -> str:
        found = planned(fp8)
        return facts(Planned(found.subject, "a model", "", None), Plan(found.machine, 8, (found,)))["precision"]

    assert told(None) == "bf16; MFU is of 989.4 TFLOP/s, the peak in bf16"
    assert told(Fp8("blockwise", encoder=False, last_layers_bf16=1)) == (
        "bf16, linears of the language model in FP8 (blockwise) but for the first 0 and the last 1 layers of each; "
        "MFU is of 1,979 TFLOP/s, the peak in fp8"
    )
    assert "of the encoder in FP8 (tensorwise); MFU is of 989.4" in told(Fp8("tensorwise", llm=False))


def test_the_arithmetic_names_copies_and_both_kinds_of_layers() -> None:
    rows = {part: how for part, how, _ in arithmetic(planned(Fp8("tensorwise", first_layers_bf16=1)), 0)}
    assert f"{27 * HEAD:,} weights of linears in FP8 x 2 bytes + {25 * ENCODER:,} weights" in rows["copies"]
    assert "27 layers in FP8 x " in rows["activations"] and " and 1 layers in bf16 x " in rows["activations"]
