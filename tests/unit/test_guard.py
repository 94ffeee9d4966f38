"""The rule by which a step is applied or not, and what it remembers."""

from __future__ import annotations

import math

import pytest

from pivot_megatron.config.schema import Faults
from pivot_megatron.train.guard import Guard


def guard(
    losses: list[float], norms: list[float] | None = None, factor: float | None = 3.0, clip: float = 1.0
) -> Guard:
    found = Guard(Faults(spike_factor=factor, spike_window=4), clip)
    for loss, norm in zip(losses, norms or [0.5] * len(losses)):
        found = found.after(loss, norm, applied=True)
    return found


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_and_named(wrong: float) -> None:
    plain = Guard(Faults(), 1.0)
    assert plain.judge(wrong, 1.0) == f"loss {wrong}"
    assert plain.judge(1.0, wrong) == f"gradient norm {wrong}"
    assert plain.judge(wrong, wrong) == f"loss {wrong} and gradient norm {wrong}"
    assert plain.judge(1e30, 1e30) is None


def test_a_loss_spikes_above_its_factor_of_the_median() -> None:
    usual = guard([2.0, 9.0, 2.0, 2.0])
    assert usual.judge(5.9, 0.5) is None
    assert usual.judge(6.1, 0.5) == "loss 6.1, a spike over the median 2"


def test_losses_near_zero_and_below_are_measured_in_nats() -> None:
    assert guard([0.001] * 4).judge(0.2, 0.5) is None
    assert guard([0.001] * 4).judge(0.21, 0.5) is not None
    assert guard([-1.0] * 4).judge(0.9, 0.5) is None
    assert guard([-1.0] * 4).judge(1.1, 0.5) is not None


def test_a_gradient_spikes_above_its_factor_of_the_median_but_never_under_the_clip() -> None:
    assert guard([1.0] * 4, [0.01] * 4).judge(1.0, 2.9) is None
    assert guard([1.0] * 4, [0.01] * 4).judge(1.0, 3.1) is not None
    assert guard([1.0] * 4, [2.0] * 4).judge(1.0, 5.9) is None
    assert guard([1.0] * 4, [2.0] * 4).judge(1.0, 6.1) == "gradient norm 6.1, a spike over the median 2"
    assert guard([1.0] * 4, [0.01] * 4, clip=0.0).judge(1.0, 0.031) is not None


def test_nothing_spikes_before_the_window_is_full_or_without_a_factor() -> None:
    assert guard([1.0] * 3).judge(100.0, 100.0) is None
    assert guard([1.0] * 9, factor=None).judge(100.0, 100.0) is None


def test_the_median_is_of_the_last_applied_steps_alone() -> None:
    found = guard([9.0, 9.0, 1.0, 1.0, 1.0, 1.0])
    assert found.losses == (1.0,) * 4
    assert found.after(50.0, 1.0, applied=False).losses == found.losses


def test_the_run_stops_past_so_many_in_a_row() -> None:
    found = Guard(Faults(most_skipped=2), 1.0)
    for exhausted in (False, False, True):
        found = found.after(math.nan, math.nan, applied=False)
        assert found.exhausted == exhausted
    assert found.after(1.0, 1.0, applied=True).skipped == 0
    assert Guard(Faults(most_skipped=0), 1.0).after(math.nan, 1.0, applied=False).exhausted


def test_what_it_remembers_goes_on_from_a_checkpoint() -> None:
    found = guard([1.0, 2.0, 3.0, 4.0]).after(9.0, 9.0, applied=False)
    assert guard([]).restored(found.state) == found
    assert guard([]).restored({}) == guard([])
    shorter = Guard(Faults(spike_factor=3.0, spike_window=2), 1.0).restored(found.state)
    assert shorter.losses == (3.0, 4.0)
