"""Pipelines by formula against a simulation of every forward and backward pass of every stage."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pivot_megatron.config.schema import Batch, Layout, Precision, Recompute
from pivot_megatron.plan.estimate import Estimate, Subject, estimate
from pivot_megatron.plan.explain import arithmetic
from pivot_megatron.plan.hardware import GIB, gpu
from pivot_megatron.plan.layer_work import Numbers
from pivot_megatron.plan.memory import encoder_in_flight, in_flight, kept_bytes
from pivot_megatron.plan.model_work import head_layer
from pivot_megatron.plan.pipeline import ROUNDS, even, interleaved
from pivot_megatron.plan.workload import Lengths
from tests.plans import HEADS, SO400M, model

Task = tuple[str, int, int]
"""Forward or backward, which chunk, which micro-batch."""


def order(stage: int, stages: int, micro_batches: int, chunks: int) -> list[Task]:
    """Of one stage, as megatron-core's schedules go: some forward passes to warm up, then one of each, then the rest."""
    group = stages if chunks > 1 else micro_batches
    turns = [
        (chunk, micro)
        for first in range(0, micro_batches, group)
        for chunk in range(chunks)
        for micro in range(first, min(first + group, micro_batches))
    ]
    ahead = [("forward", *turn) for turn in turns]
    back = [("backward", chunks - 1 - chunk, micro) for chunk, micro in turns]
    warm_up = stages - stage - 1 if chunks == 1 else 2 * (stages - stage - 1) + (chunks - 1) * stages
    warm_up = min(warm_up, len(turns))
    steady = [task for both in zip(ahead[warm_up:], back, strict=False) for task in both]
    return [*ahead[:warm_up], *steady, *back[len(turns) - warm_up :]]


def simulated(stages: Sequence[float], micro_batches: int, chunks: int = 1) -> tuple[float, list[int]]:
    """As `played`, of stages whose chunks are alike."""
    return played([[stage / chunks] * chunks for stage in stages], micro_batches)


def played(stages: Sequence[Sequence[float]], micro_batches: int) -> tuple[float, list[int]]:
    """Seconds until all is done, and the most chunks that each stage holds activations of. `stages`: seconds of a micro-batch
    through each one's chunks, a third of them forward; a message takes none."""
    count, chunks = len(stages), len(stages[0])
    orders = [order(stage, count, micro_batches, chunks) for stage in range(count)]
    done: dict[tuple[int, Task], float] = {}
    clocks, places = [0.0] * count, [0] * count

    def needs(stage: int, task: Task) -> list[tuple[int, Task]]:
        way, chunk, micro = task
        if way == "forward":
            before = (stage - 1, chunk) if stage else (count - 1, chunk - 1)
            return [(before[0], (way, before[1], micro))] if before[1] >= 0 else []
        after = (stage + 1, chunk) if stage + 1 < count else (0, chunk + 1)
        own = (stage, ("forward", chunk, micro))
        return [own, (after[0], (way, after[1], micro))] if after[1] < chunks else [own]

    while any(place < len(tasks) for place, tasks in zip(places, orders, strict=True)):
        moved = False
        for stage, tasks in enumerate(orders):
            while places[stage] < len(tasks) and all(need in done for need in needs(stage, tasks[places[stage]])):
                task = tasks[places[stage]]
                begin = max([clocks[stage], *(done[need] for need in needs(stage, task))])
                clocks[stage] = begin + stages[stage][task[1]] * (1 / 3 if task[0] == "forward" else 2 / 3)
                done[stage, task] = clocks[stage]
                places[stage] += 1
                moved = True
        assert moved, "the order waits for itself"
    return max(clocks), [most_held(tasks) for tasks in orders]


def most_held(tasks: Sequence[Task]) -> int:
    alive = [0]
    for way, *_ in tasks:
        alive.append(alive[-1] + (1 if way == "forward" else -1))
    return max(alive)


LAYOUTS = st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 5))


@given(LAYOUTS)
def test_micro_batches_in_flight_are_those_of_the_schedule(sizes: tuple[int, int, int]) -> None:
    stages, chunks, groups = sizes
    if stages == 1:
        chunks = 1
    micro_batches = groups * stages if chunks > 1 else groups
    layout = Layout(pipeline=stages, virtual_pipeline=chunks)
    _, held = simulated([1.0] * stages, micro_batches, chunks)
    assert [in_flight(layout, stage, micro_batches) * chunks for stage in range(stages)] == held


@given(LAYOUTS)
def test_images_in_flight_are_those_of_the_first_chunk(sizes: tuple[int, int, int]) -> None:
    stages, chunks, groups = sizes
    if stages == 1:
        chunks = 1
    micro_batches = groups * stages if chunks > 1 else groups
    first = [task for task in order(0, stages, micro_batches, chunks) if task[1] == 0]
    assert encoder_in_flight(Layout(pipeline=stages, virtual_pipeline=chunks), micro_batches) == most_held(first)


def planned(chunks: int) -> Estimate:
    """Of 72B, 80 layers, over four stages; 32 micro-batches, of one pair each."""
    pair = Lengths(636, (200, 200), 400, 1, 576)
    batch = Batch(32, 1036, steps=1)
    arch = model(SO400M, HEADS["72B"])
    subject = Subject(arch, Precision(), Recompute("none", "none"), (), batch, (pair,) * 32)
    return estimate(subject, Layout(tensor=8, pipeline=4, virtual_pipeline=chunks), 32, gpu("h100"))


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_a_stage_keeps_the_layers_of_every_chunk_that_it_holds(chunks: int) -> None:
    """And, a micro-batch in flight, what comes in and what goes out; on the last stage less of the last layer."""
    found = planned(chunks)
    (pack,) = set(found.packs)
    layer = kept_bytes(head_layer(found.subject.arch.head), Numbers("bf16", 8, True), pack.tokens, pack.keys, "none")
    _, held = simulated([1.0] * 4, 32, chunks)
    between = [2 * (2 * pack.tokens * 8192 / 8) * passes / chunks for passes in held]
    # Past its attention: two of the stream, and gate, value and their product; in bf16.
    unscored = 2 * (pack.tokens - 400) * (2 * 8192 + 3 * 29568) / 8
    expected = [passes * 20 / chunks * layer + more for passes, more in zip(held, between, strict=True)]
    expected[-1] -= unscored
    assert len(found.packs) == 32 and [s.memory.activations for s in found.stages] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_what_is_explained_multiplies_to_what_stands_beside(chunks: int) -> None:
    """But for what stands between stages, the pixels and the projector's, which are counted here by hand."""
    found = planned(chunks)
    (pack,) = set(found.packs)
    rows = {part: (how, float(gib)) for part, how, gib in arithmetic(found, 0)}
    pattern = r"(\d+) layers x ([\d.,]+) MiB a layer .* x ([\d.]+) (?:micro-batches )?in flight"
    factors = {part: re.match(pattern, rows[part][0]) for part in ("activations", "encoder")}
    (layers, each, alive), (seen, one, images) = (
        [float(text.replace(",", "")) for text in match.groups()] for match in factors.values() if match
    )
    assert (layers, seen) == (20, 26)
    activations = layers * each / 1024 * alive + alive * 2 * (2 * pack.tokens * 8192 / 8) / GIB
    assert activations == pytest.approx(rows["activations"][1], abs=0.006 + 0.05 / each * activations)
    projector = 2 * 576 * (1152 / 8 + (2 / 8 + 1) * 8192)
    vision = seen * one / 1024 * images + (images * projector + 4 * 3 * 384**2) / GIB
    assert vision == pytest.approx(rows["encoder"][1], abs=0.006 + 0.05 / one * vision)


def thirds(stages: Sequence[Sequence[float]], micro_batches: int) -> float:
    """What plans say of the same."""
    ahead = tuple(tuple(chunk / 3 for chunk in stage) for stage in stages)
    return interleaved(ahead, tuple(tuple(2 * chunk for chunk in stage) for stage in ahead), micro_batches)


@given(st.integers(1, 6), st.integers(1, 5))
def test_even_stages_take_what_the_formula_says(stages: int, groups: int) -> None:
    """Exactly, once there are as many micro-batches as stages."""
    found, _ = simulated([1.0] * stages, groups * stages)
    assert even([1.0] * stages, groups * stages) == pytest.approx(found, rel=1e-12)


@given(st.lists(st.floats(0.2, 1.0), min_size=2, max_size=8), st.integers(1, 24))
def test_uneven_stages_take_at_most_what_the_formula_says(stages: list[float], micro_batches: int) -> None:
    found, _ = simulated(stages, micro_batches)
    said = even(stages, micro_batches)
    assert found <= said * (1 + 1e-12) and micro_batches * max(stages) <= found * (1 + 1e-12)


@pytest.mark.parametrize("place", [0, 1, 3])
def test_one_slow_stage_is_counted_within_7_per_cent(place: int) -> None:
    """Exactly where it is the last: an earlier one begins, or ends, while others fill and drain."""
    stages = [1.0] * 4
    stages[place] = 1.5
    found, _ = simulated(stages, 16)
    assert found <= even(stages, 16) * (1 + 1e-12)
    assert even(stages, 16) == pytest.approx(found, rel=1e-12 if place == 3 else 0.07)


@given(st.integers(2, 6), st.integers(2, 4), st.integers(1, 8))
def test_chunks_that_are_alike_divide_the_time_to_fill_and_drain(stages: int, chunks: int, rounds: int) -> None:
    """Narayanan et al. 2021, section 2.2; also of more rounds than are played through."""
    said = thirds([[1 / chunks] * chunks] * stages, rounds * stages)
    assert said == pytest.approx(rounds * stages + (stages - 1) / chunks, rel=1e-12)


CHUNKS = st.tuples(st.integers(2, 5), st.integers(2, 4)).flatmap(
    lambda sizes: st.lists(
        st.lists(st.floats(0.1, 1.0), min_size=sizes[1], max_size=sizes[1]), min_size=sizes[0], max_size=sizes[0]
    )
)


@given(CHUNKS, st.integers(1, ROUNDS))
def test_uneven_chunks_take_what_the_simulation_takes(stages: list[list[float]], rounds: int) -> None:
    found, _ = played(stages, rounds * len(stages))
    assert thirds(stages, rounds * len(stages)) == pytest.approx(found, rel=1e-12)


@given(CHUNKS, st.integers(ROUNDS + 1, 12))
def test_rounds_that_are_not_played_are_like_the_last_that_is(stages: list[list[float]], rounds: int) -> None:
    found, _ = played(stages, rounds * len(stages))
    said = thirds(stages, rounds * len(stages))
    assert said == pytest.approx(found, rel=0.03)
    assert said >= rounds * len(stages) * max(map(sum, stages)) * (1 - 1e-12)


def test_an_encoder_in_the_first_chunk_by_hand() -> None:
    """Two micro-batches of two stages of two chunks, forward alone: 3 seconds through the first chunk and 1 through any other.
    The first stage is done with the first chunk after 3 and 6, with its second after 7 and 8, the last chunk after 8 and 9."""
    assert interleaved(((3.0, 1.0), (1.0, 1.0)), None, 2) == 9.0


def test_work_of_one_chunk_alone_is_not_shortened_by_chunks() -> None:
    said = thirds([[1.0, 0.0], [0.0, 0.0]], 2)
    assert said == pytest.approx(even([1.0, 0.0], 2), rel=1e-12)


def test_a_plan_plays_through_its_own_chunks() -> None:
    found = planned(2)
    times = [[(c.forward + c.sends, c.backward + c.sends) for c in stage.chunks] for stage in found.stages]
    ahead, back = (tuple(tuple(chunk[way] for chunk in stage) for stage in times) for way in (0, 1))
    assert found.passages_seconds == interleaved(ahead, back, 32) > 32 * found.slowest.passage.total
    assert [sum(map(sum, stage)) for stage in times] == pytest.approx(
        [s.passage.total for s in found.stages], rel=1e-12
    )
    assert ahead[0][0] > 1.2 * ahead[0][1]  # the encoder
