from pivot_megatron.train.stragglers import slowest


def test_the_slowest_is_named_with_what_it_took_and_what_the_others_do() -> None:
    found = slowest(40, 20, ["a", "a", "b"], [(20.0, 0.0), (20.0, 4.0), (20.0, 28.0)])
    assert (found.rank, found.host, found.step, found.steps) == (2, "b", 40, 20)
    assert (found.seconds, found.data_seconds, found.median_seconds, found.slower) == (2.4, 1.4, 1.2, 2.0)
    assert found.as_text() == (
        "steps 21 to 40: rank 2 on b takes 2.00 times the median (2.400 s against 1.200 s a step, "
        "1.400 s of it waiting for data)"
    )
