"""Who is to blame, by what ranks told of themselves."""

from __future__ import annotations

from dataclasses import replace

from pivot_megatron.runtime.beats import Beat, Heard, find_fault

FINE = Beat(
    number=7, place=20, step=5, phase="forward and backward", seconds=3.0, patience=600.0, limit="to_hang", host="a"
)


def heard(*beats: Beat, silent: dict[int, float] | None = None) -> list[Heard]:
    return [Heard(rank, beat, (silent or {}).get(rank, 0.0)) for rank, beat in enumerate(beats)]


def test_nothing_is_wrong_with_ranks_that_get_on() -> None:
    assert find_fault(heard(FINE, replace(FINE, place=21)), silence=60.0) is None


def test_a_silent_rank_is_named_with_its_host_and_where_it_was_last() -> None:
    found = find_fault(heard(FINE, replace(FINE, host="b"), silent={1: 61.0}), silence=60.0)
    assert found == "rank 1 on b gave no sign of life for 61 s; last seen at step 5, forward and backward"


def test_the_one_that_others_wait_for_is_to_blame_and_not_they() -> None:
    waiting = replace(FINE, seconds=700.0)
    late = replace(FINE, place=19, phase="waiting for data", seconds=700.0, host="c")
    found = find_fault(heard(waiting, waiting, late), silence=60.0)
    assert found == "rank 2 on c has been at step 5, waiting for data for 700 s, and the others wait (to_hang)"


def test_who_waits_for_one_that_may_still_take_its_time_is_not_to_blame() -> None:
    saving = replace(FINE, place=19, phase="saving", seconds=700.0, patience=1800.0, limit="for_files")
    assert find_fault(heard(replace(FINE, seconds=690.0), saving), silence=60.0) is None
    found = find_fault(heard(FINE, replace(saving, seconds=1801.0)), silence=60.0)
    assert found is not None and "rank 1 on a" in found and found.endswith(" (for_files)")


def test_who_waited_for_one_that_has_only_just_come_is_not_to_blame() -> None:
    """It may take its time to be told that all are there."""
    waited = replace(FINE, seconds=700.0)
    assert find_fault(heard(waited, replace(FINE, seconds=0.0)), silence=60.0) is None
    found = find_fault(heard(replace(FINE, seconds=1300.0), replace(FINE, seconds=601.0)), silence=60.0)
    assert found is not None and "all 2 ranks" in found and "for 601 s" in found


def test_where_all_are_at_the_same_place_none_is_named() -> None:
    stuck = replace(FINE, seconds=601.0)
    found = find_fault(heard(stuck, stuck), silence=60.0)
    assert (
        found
        == "all 2 ranks have been at step 5, forward and backward for 601 s, none of them behind the others (to_hang)"
    )
    assert (
        find_fault(heard(stuck), silence=60.0)
        == "rank 0 on a has been at step 5, forward and backward for 601 s (to_hang)"
    )


def test_a_rank_that_said_why_it_left_is_quoted() -> None:
    left = replace(FINE, ended="data.shards: sample 007: bad_image")
    found = find_fault(heard(FINE, left, FINE, silent={1: 61.0, 2: 61.0}), silence=60.0)
    assert found == "rank 1 on a ended: data.shards: sample 007: bad_image"


def test_a_line_names_a_few_of_many() -> None:
    found = find_fault(heard(*[FINE] * 9, silent=dict.fromkeys(range(9), 61.0)), silence=60.0)
    assert found is not None and "rank 3 on a and 5 more gave" in found


def test_a_beat_comes_back_from_the_store_as_it_was() -> None:
    assert Beat.from_json(FINE.as_json().encode()) == FINE
