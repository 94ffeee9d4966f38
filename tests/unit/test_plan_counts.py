"""What plans count with, against sums made by hand and the project's other counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pivot_megatron.bench import flops as bench
from pivot_megatron.config.schema import Batch, Layout, ParameterRule, Precision, Recompute
from pivot_megatron.families.flops import encoder_flops, head_flops, projector_flops
from pivot_megatron.model.composition import Architecture
from pivot_megatron.plan.candidates import layouts
from pivot_megatron.plan.estimate import Subject, estimate
from pivot_megatron.plan.explain import arithmetic
from pivot_megatron.plan.hardware import GIB, gpu
from pivot_megatron.plan.layer_work import Numbers, forward
from pivot_megatron.plan.limits import limited_by, spent
from pivot_megatron.plan.machine import Link
from pivot_megatron.plan.model_work import head_layer
from pivot_megatron.plan.operations import operations
from pivot_megatron.plan.plan import plan, plan_one, recomputing
from pivot_megatron.plan.step_time import ends
from pivot_megatron.plan.workload import Lengths, visible
from tests.plans import HEADS, SO400M, alike, model

SEVEN = model(SO400M, HEADS["7B"])
H100 = gpu("h100")
PAIR = Lengths(636, (200, 200), 400, 1, 576)
PAIRS = 32


def subject(arch: Architecture, samples: int = PAIRS, mode: Any = "full", **more: Any) -> Subject:
    batch = Batch(samples, 8192, steps=10)
    return Subject(arch, Precision(), Recompute(mode, mode), (), batch, (PAIR,) * samples, 10, **more)


def unpadded(arch: Architecture) -> Architecture:
    """With widths that need no padding, so that all that is computed counts."""
    encoder, head = arch.encoder, arch.head
    return replace(
        arch,
        encoder=replace(encoder, ffn=encoder.padded_ffn),
        head=replace(head, vocabulary=head.padded_vocabulary),
    )


def step_flops(arch: Architecture, sample: Lengths) -> float:
    """Forward and backward of one sample, the encoder's layers past its features left out; each query with what it sees."""
    patches = encoder_flops(arch.encoder, 0)
    layers = encoder_flops(arch.encoder, arch.encoder_layers) - patches
    head = head_flops(arch.head, sample.segments, sample.scored)
    return 2 * patches + 3 * (layers + projector_flops(arch.encoder, arch.head) + head)


# 1024 tokens need no padding; micro-batches hold eight of them.
WHOLE = Lengths(624, (200, 200), 400, 1, 576)


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2, pipeline=2), Layout(pipeline=2, first_stage_layers=12)])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_a_steps_operations_are_those_of_families(layout: Layout, mode: Any) -> None:
    """Where nothing is padded; whatever is made anew, and however it is cut, but that each tensor-parallel rank embeds all
    patches."""
    arch = unpadded(SEVEN)
    planned = replace(subject(arch, mode=mode), samples=(WHOLE,) * PAIRS)
    found = estimate(planned, layout, 8, H100)
    assert all(pack.tokens == 1024 * len(pack.samples) for pack in found.packs)
    again = (layout.tensor - 1) * 2 * encoder_flops(arch.encoder, 0)
    assert found.flops == pytest.approx(PAIRS * (step_flops(arch, WHOLE) + again), rel=1e-12)


def test_padding_of_so400m_and_7b_is_all_that_is_more() -> None:
    """The encoder's FFN is 4352 wide in place of 4304; the head's vocabulary is whole."""
    found = estimate(replace(subject(SEVEN), samples=(WHOLE,) * PAIRS), Layout(), 8, H100)
    more = 3 * 2 * 26 * 576 * 2 * 1152 * (4352 - 4304)
    assert found.flops == pytest.approx(PAIRS * (step_flops(SEVEN, WHOLE) + more), rel=1e-12)


def test_the_bench_counts_the_same_but_for_what_a_causal_mask_hides() -> None:
    arch = unpadded(SEVEN)
    lengths = bench.PairLengths(WHOLE.prefix, 200, 200, WHOLE.scored)
    counted = bench.forward(arch, bench.pivot_work([lengths]))
    full = sum(queries * keys for queries, keys in WHOLE.segments)
    by_hand = 28 * 4 * full * 28 * 128
    assert counted.attention == pytest.approx(by_hand, rel=1e-12)
    hidden = counted.attention * (1 - visible(WHOLE.segments) / full)
    step = (counted + bench.backward(counted)).total - 3 * hidden
    assert step == pytest.approx(step_flops(arch, WHOLE), rel=1e-12)


def test_utilisation_counts_as_metrics_do() -> None:
    arch = SEVEN
    lengths = bench.PairLengths(WHOLE.prefix, 200, 200, WHOLE.scored)
    counted = bench.forward(arch, bench.pivot_work([lengths]))
    found = estimate(replace(subject(arch), samples=(WHOLE,) * PAIRS), Layout(tensor=2), 8, H100)
    step = PAIRS * (counted + bench.backward(counted)).total
    assert found.utilisation == pytest.approx(step / (found.step_seconds * 8 * 989.4e12), rel=1e-12)


# By hand: Qwen2.5-7B as published; So400m's 26 layers below its features, FFN 4304 padded to 4352, no pooling head.
_HEAD = 7_615_616_512
_LAYER = 4 * 1152**2 + 4 * 1152 + 2 * 1152 * 4352 + 4352 + 1152 + 4 * 1152
_ENCODER = 3 * 16 * 16 * 1152 + 1152 + 576 * 1152 + 26 * _LAYER
_PROJECTOR = 1152 * 3584 + 3584 + 3584**2 + 3584
COUNT = _HEAD + _ENCODER + _PROJECTOR


@pytest.mark.parametrize("replicas", [1, 8])
def test_weights_gradients_and_optimizer_by_hand(replicas: int) -> None:
    """18 bytes a parameter in bf16, of which 12 are split over replicas."""
    (stage,) = estimate(subject(SEVEN), Layout(), replicas, H100).stages
    memory = stage.memory
    assert stage.parameters == stage.trained == COUNT
    assert (memory.weights, memory.gradients, memory.optimizer) == (2 * COUNT, 4 * COUNT, 12 * COUNT / replicas)


def test_frozen_weights_have_neither_gradients_nor_moments() -> None:
    aligned = replace(subject(SEVEN), rules=(ParameterRule("encoder.*", "frozen"), ParameterRule("llm.*", "frozen")))
    (stage,) = estimate(aligned, Layout(), 8, H100).stages
    assert stage.memory.weights == 2 * COUNT
    assert (stage.memory.gradients, stage.memory.optimizer) == (4 * _PROJECTOR, 12 * _PROJECTOR / 8)
    (pack,) = set(estimate(aligned, Layout(), 8, H100).packs)
    images = len(pack.samples)
    kept = 2 * images * 576 * (1152 + 3 * 3584)  # the projector's alone, and the pixels as they came
    assert stage.memory.encoder == kept + 4 * images * 3 * 384**2


def test_an_online_reference_is_one_more_set_of_weights_and_one_more_forward_pass() -> None:
    cached, online = (estimate(replace(subject(SEVEN), online=on), Layout(), 8, H100) for on in (False, True))
    assert online.stages[0].memory.reference == 2 * COUNT
    assert online.step_seconds == pytest.approx(cached.step_seconds + cached.forward_seconds, rel=1e-12)


@pytest.mark.parametrize("tensor", [2, 4])
def test_messages_between_tensor_parallel_ranks_by_hand(tensor: int) -> None:
    """A layer gathers and scatters its sequence twice."""
    numbers = Numbers("bf16", tensor, True)
    found = forward(head_layer(SEVEN.head), numbers, 1000, [(1000, 1000)], None)
    sent = sum(op.traffic for op in found if op.kind == "message")
    assert sent == pytest.approx(4 * (tensor - 1) / tensor * 1000 * 3584 * 2, rel=1e-12)


def test_messages_between_replicas_by_hand() -> None:
    """float32 gradients out, bf16 weights back, each (n - 1) / n of the whole; where nodes are left, over a network port for each
    of a group's members on a node."""
    machine = replace(H100, node=alike(Link.of(1.0, 1e9)), network=alike(Link.of(2.0, 1e8)))
    near = ends(10**9, Layout(), Precision(), machine, 4, 0.0, 0)
    assert (near.gradients, near.gather) == pytest.approx((1 + 4 * 0.75, 1 + 2 * 0.75), rel=1e-12)
    far = ends(10**9, Layout(), Precision(), machine, 16, 0.0, 0)
    assert (far.gradients, far.gather) == pytest.approx((2 + 40 / 8 * 15 / 16, 2 + 20 / 8 * 15 / 16), rel=1e-12)
    apart = ends(10**9, Layout(tensor=4), Precision(), machine, 16, 0.0, 0)
    assert (apart.gradients, apart.gather) == pytest.approx((8 + 40 / 2 * 15 / 16, 8 + 20 / 2 * 15 / 16), rel=1e-12)
    hidden = ends(10**9, Layout(overlap_gradient_reduce=True), Precision(), machine, 4, 3.0, 0)
    assert hidden.gradients == pytest.approx(1.0, rel=1e-12)


def test_tied_words_are_added_up_over_the_first_and_the_last_stage() -> None:
    """Which lie on two nodes where a pipeline's ends do, also if its neighbours share one."""
    machine = replace(H100, node=alike(Link.of(1.0, 1e9)), network=alike(Link.of(2.0, 1e8)))
    near, far = (ends(0, Layout(pipeline=stages), Precision(), machine, 4, 0.0, 10**8) for stages in (2, 4))
    assert near.gradients - 1 == pytest.approx(1 + 0.4, rel=1e-12)
    assert far.gradients - 1 == pytest.approx(2 + 4.0, rel=1e-12)


def test_loaders_that_are_slower_than_devices_set_the_pace() -> None:
    """They run steps ahead, so a step takes as long as the slower of the two; without a rate it is the devices."""
    free, fed, starved = (
        estimate(subject(SEVEN), Layout(), 8, replace(H100, images_a_second=rate)) for rate in (None, 1000.0, 0.5)
    )
    assert free.images == 4  # one image a pair, and eight replicas
    assert free.step_seconds == fed.step_seconds == fed.device_seconds and fed.loading_seconds == 4 / 1000
    assert starved.step_seconds == 8.0 and starved.device_seconds == fed.device_seconds < 8.0
    assert spent(starved)["waiting for data"] == pytest.approx(8.0 - fed.device_seconds)
    assert sum(spent(starved).values()) == pytest.approx(8.0) and spent(fed)["waiting for data"] == 0
    assert limited_by(starved) == f"data: loaders take 8.000 s a step, devices {fed.device_seconds:.3f}"
    assert not limited_by(fed).startswith("data")
    cached = replace(starved, subject=replace(starved.subject, reference=9.0))
    assert cached.hours == pytest.approx((10 + 9) * 8.0 / 3600)


CUT = list(layouts(SEVEN, Precision(), Layout(), 16, 8, PAIRS))


def test_ends_of_a_pipeline_hold_no_more_than_what_is_between() -> None:
    shares = [[stage.layers for stage in estimate(subject(SEVEN), layout, 16, H100).stages] for layout in CUT]
    assert all(sum(share) == 28 for share in shares)
    assert all(max(share[0], share[-1]) <= share[1] for share in shares if len(share) > 2)
    uneven = {tuple(share) for share in shares if len(set(share)) > 1}
    assert uneven >= {(12, 16), (16, 12), (4, 8, 8, 8), (8, 8, 8, 4), (7, 8, 8, 5), (5, 8, 8, 7)}
    alike = [(layout.tensor, layout.virtual_pipeline, *share) for layout, share in zip(CUT, shares, strict=True)]
    assert len(alike) == len(set(alike))


@given(st.sampled_from(CUT), st.sampled_from([1, 2, 4]))
def test_replicas_never_raise_what_a_rank_holds_for_good(layout: Layout, times: int) -> None:
    size = layout.model_parallel_size
    few, many = (estimate(subject(SEVEN), layout, size * n, H100) for n in (times, 2 * times))
    for one, other in zip(few.stages, many.stages, strict=True):
        assert other.memory.optimizer <= one.memory.optimizer
        assert (other.memory.weights, other.memory.gradients) == (one.memory.weights, one.memory.gradients)


@given(st.sampled_from(CUT))
def test_what_is_made_anew_takes_time_and_saves_memory(layout: Layout) -> None:
    none, selective, full = recomputing(estimate(subject(SEVEN), layout, 16, H100)).values()
    seconds = [found.step_seconds for found in (none, selective, full)]
    assert seconds == pytest.approx(sorted(seconds), rel=1e-12)  # alike where all of it hides messages
    for least, most in zip(full.stages, none.stages, strict=True):
        if most.layers > 2:  # a stage of one layer has nothing but the one that is made anew
            assert least.memory.total <= most.memory.total


@given(st.sampled_from(CUT), st.booleans(), st.sampled_from(["none", "full"]))
def test_parts_come_to_the_whole(layout: Layout, online: bool, mode: Any) -> None:
    found = estimate(subject(SEVEN, mode=mode, online=online), layout, 16, H100)
    assert sum(spent(found).values()) == pytest.approx(found.step_seconds, rel=1e-9)
    told = found.prediction
    assert sum(told.parts.values()) + told.idle_seconds == pytest.approx(found.step_seconds, rel=1e-9)
    for n, stage in enumerate(found.stages):
        listed = sum(op.seconds for op in operations(found, n)) + stage.sends
        assert listed == pytest.approx(stage.passage.total, rel=1e-9)
        *parts, total = [float(gib) for *_, gib in arithmetic(found, n)]
        assert sum(parts) == pytest.approx(total, abs=0.05) and total == pytest.approx(
            stage.memory.total / GIB, abs=0.01
        )


def test_a_batch_several_times_over_is_packed_as_one() -> None:
    """Of samples that are alike and fall evenly on the replicas' micro-batches, exactly as if all were laid out."""
    laid = replace(subject(SEVEN, 64), batch=Batch(64, 8192, steps=10))
    times = replace(subject(SEVEN, 16), batch=Batch(64, 8192, steps=10), times=4)
    for layout, gpus in ((Layout(), 8), (Layout(tensor=2), 32), (Layout(pipeline=2, virtual_pipeline=2), 16)):
        one, other = estimate(laid, layout, gpus, H100), estimate(times, layout, gpus, H100)
        assert (one.step_seconds, one.samples_a_second) == pytest.approx((other.step_seconds, other.samples_a_second))


def test_the_fastest_that_fits_comes_first_whatever_is_left_out() -> None:
    """Modes that cannot win are not estimated; none of all would have."""
    found = plan(subject(SEVEN), Layout(), 8, H100)
    assert [e.fits for e in found.estimates] == sorted((e.fits for e in found.estimates), reverse=True)
    seconds = [e.step_seconds for e in found.fitting]
    assert seconds == sorted(seconds)
    for layout in {e.layout for e in found.estimates[:5]}:
        best = next(e for e in found.estimates if e.layout == layout)
        for mode in ("none", "selective", "full"):
            for micro in (4096, 8192, 16384):
                tried = replace(subject(SEVEN, mode=mode), batch=Batch(PAIRS, micro, steps=10))
                other = plan_one(tried, layout, 8, H100).best
                assert not other.fits or other.step_seconds >= best.step_seconds
