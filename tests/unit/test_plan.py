"""Micro-batches: within the budget, nothing lost, even in work, and the same for everyone who asks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pivot_megatron.data.plan import Shown, Size, plan_micro_batches

SIZES = st.lists(st.builds(Size, st.integers(1, 50), st.integers(0, 2), st.floats(1, 1e3)), max_size=40)


@given(SIZES, st.integers(1, 5), st.integers(50, 200), st.one_of(st.none(), st.integers(2, 6)))
def test_every_sample_once_within_the_budget(sizes, ranks, tokens, images) -> None:
    plan = plan_micro_batches(sizes, ranks, tokens, images)
    assert len(plan) == ranks and len({len(batches) for batches in plan}) == 1
    assert sorted(i for batches in plan for batch in batches for i in batch) == list(range(len(sizes)))
    for batches in plan:
        for batch in batches:
            assert sum(sizes[i].tokens for i in batch) <= tokens and batch == sorted(batch)
            assert images is None or sum(sizes[i].images for i in batch) <= images


@given(st.lists(st.floats(1, 1e3), min_size=1, max_size=40), st.integers(1, 6))
def test_work_is_within_grahams_bound(work, bins) -> None:
    plan = plan_micro_batches([Size(1, 0, w) for w in work], bins, 1000, None)
    loads = [sum(work[i] for i in batch) for batches in plan for batch in batches]
    # No schedule does better than the lower bound; list scheduling in any order keeps to the upper (Graham 1966).
    assert max(loads) <= (sum(work) - max(work)) / bins + max(work) + 1e-9
    assert max(loads) >= max(sum(work) / bins, max(work)) - 1e-9


def test_known_schedule() -> None:
    """Seven jobs on three machines, Graham's worst case for longest-first: 11 where 9 is best."""
    sizes = [Size(1, 0, w) for w in (5, 5, 4, 4, 3, 3, 3)]
    plan = plan_micro_batches(sizes, 3, 10, None)
    assert sorted(sum(sizes[i].flops for i in batch) for (batch,) in plan) == [8, 8, 11]


def test_samples_that_are_alike_are_shared_out_evenly() -> None:
    """256 of 1,036 tokens over eight ranks, seven to a micro-batch: forty of six or seven, and no rank with more than another."""
    plan = plan_micro_batches([Size(1036, 1, 1.0)] * 256, 8, 8192, None)
    assert [len(batches) for batches in plan] == [5] * 8
    assert [sum(map(len, batches)) for batches in plan] == [32] * 8


def test_more_micro_batches_where_one_is_too_small() -> None:
    sizes = [Size(60, 1, 1.0)] * 4
    assert [len(batches) for batches in plan_micro_batches(sizes, 1, 100, None)] == [4]
    assert [len(batches) for batches in plan_micro_batches(sizes, 2, 120, None)] == [1, 1]
    assert [len(batches) for batches in plan_micro_batches(sizes, 2, 1000, 1)] == [2, 2]


@given(SIZES, st.integers(1, 5), st.integers(50, 120), st.one_of(st.none(), st.integers(2, 6)), st.integers(1, 3))
def test_each_goes_where_the_least_work_stands_of_all_that_it_fits(sizes, ranks, tokens, images, multiple) -> None:
    def placed(bins: int) -> list[list[int]] | None:
        found: list[list[int]] = [[] for _ in range(bins)]
        for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i].flops, i)):
            fits = [
                b
                for b in range(bins)
                if not found[b]
                or (
                    sum(sizes[j].tokens for j in [*found[b], i]) <= tokens
                    and (images is None or sum(sizes[j].images for j in [*found[b], i]) <= images)
                )
            ]
            if not fits:
                return None
            found[min(fits, key=lambda b: (_added(sizes[j].flops for j in found[b]), b))].append(i)
        return found

    plan = plan_micro_batches(sizes, ranks, tokens, images, multiple)
    expected = placed(ranks * len(plan[0]))
    dealt = [rank[turn] for turn in range(len(plan[0])) for rank in plan]
    assert expected is not None and dealt == [sorted(b) for b in expected]
    if len(plan[0]) > multiple and ranks * (len(plan[0]) - multiple) * tokens >= sum(s.tokens for s in sizes):
        assert placed(ranks * (len(plan[0]) - multiple)) is None


def _added(work: Iterable[float]) -> float:
    """One after another, as the plan adds them."""
    total = 0.0
    for one in work:
        total += one
    return total


def over(image: int, of_image: float, rest: float, tokens: int = 1036) -> Size:
    return Size(tokens, 1, of_image + rest, (Shown(image, 1, of_image),))


def seen(sizes: list[Size], chosen: list[int]) -> dict[int, Shown]:
    """The images of a micro-batch, by name."""
    return {shown.name: shown for i in chosen for shown in sizes[i].shows}


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 5), st.floats(1, 100), st.floats(1, 100)), max_size=40),
    st.integers(1, 5),
    st.integers(50, 200),
    st.one_of(st.none(), st.integers(1, 6)),
)
def test_images_that_are_shared_count_once(drawn, ranks, tokens, images) -> None:
    """Image 0 is not known by name; the work of one image is the same in every sample."""
    costs = {image: cost for _, image, cost, _ in drawn}
    sizes = [
        over(image, costs[image], rest, length) if image else Size(length, 1, costs[0] + rest)
        for length, image, _, rest in drawn
    ]
    plan = plan_micro_batches(sizes, ranks, tokens, images)
    assert plan == plan_micro_batches(sizes, ranks, tokens, images)
    assert len(plan) == ranks and len({len(batches) for batches in plan}) == 1
    assert sorted(i for batches in plan for batch in batches for i in batch) == list(range(len(sizes)))
    for batch in (batch for batches in plan for batch in batches):
        assert sum(sizes[i].tokens for i in batch) <= tokens and batch == sorted(batch)
        alone = sum(not sizes[i].shows for i in batch)
        assert images is None or alone + len(seen(sizes, batch)) <= images


@pytest.mark.parametrize(
    ("ranks", "tokens", "pairs", "an_image", "most"),
    [
        (8, 8192, 256, 4, 0.35),  # seven fit, so a quarter cannot be reached
        (1, 8192, 256, 4, 0.36),
        (8, 8192, 256, 16, 0.25),
        (1, 100_000, 256, 4, 0.25),
        (8, 100_000, 32, 8, 0.25),  # each image on two ranks, for none to have more work than another
    ],
)
@pytest.mark.parametrize("of_image", [0.2, 1.0, 5.0])
def test_pairs_over_one_image_share_its_pass(ranks, tokens, pairs, an_image, most, of_image) -> None:
    """`most` passes of the encoder a pair, where it would be one; and no rank has more to do than without."""
    sizes = [over(1 + i // an_image, of_image, 1.0) for i in range(pairs)]
    plan = plan_micro_batches(sizes, ranks, tokens, None)
    assert sum(len(seen(sizes, batch)) for batches in plan for batch in batches) <= most * pairs

    def slowest(plan: list[list[list[int]]]) -> float:
        return max(sum(len(batch) + of_image * len(seen(sizes, batch)) for batch in batches) for batches in plan)

    unknown = plan_micro_batches([replace(size, shows=()) for size in sizes], ranks, tokens, None)
    assert slowest(plan) <= slowest(unknown) and len(plan[0]) == len(unknown[0])


def test_no_samples_still_make_a_micro_batch_a_rank() -> None:
    assert plan_micro_batches([], 3, 10, None) == [[[]], [[]], [[]]]


def test_a_sample_past_the_budget_stands_alone() -> None:
    assert plan_micro_batches([Size(3, 0, 2.0), Size(11, 0, 3.0), Size(3, 2, 1.0)], 1, 10, 1) == [[[1], [0], [2]]]
