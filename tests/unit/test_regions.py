"""Exclusive timers, by a clock of the test's own."""

from __future__ import annotations

from pivot_megatron.runtime.regions import Regions


class Clock:
    """Stands still but for `pass_`."""

    now = 100.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


def test_time_belongs_to_the_innermost_region_alone() -> None:
    clock = Clock()
    regions = Regions("rest", clock=clock)
    clock.pass_(1)
    with regions.within("head"):
        clock.pass_(2)
        with regions.within("communication"):
            clock.pass_(4)
            with regions.within("communication"):
                clock.pass_(8)
        clock.pass_(16)
        regions.become("encoder")
        clock.pass_(32)
        with regions.within("communication"):
            clock.pass_(64)
        clock.pass_(128)
    clock.pass_(256)
    assert regions.stop() == {"rest": 257.0, "head": 18.0, "communication": 76.0, "encoder": 160.0}
    assert sum(regions.stop().values()) == clock.now - 100


def test_an_error_leaves_its_region() -> None:
    clock = Clock()
    regions = Regions("rest", clock=clock)
    try:
        with regions.within("head"):
            clock.pass_(1)
            raise ValueError
    except ValueError:
        clock.pass_(2)
    assert regions.stop() == {"head": 1.0, "rest": 2.0}


def test_the_device_is_waited_for_at_every_boundary_before_time_is_read() -> None:
    """Work that is queued in a region takes its time there, though queueing takes none."""
    clock, queued = Clock(), [0.0]

    def settle() -> None:
        clock.pass_(queued.pop())
        queued.append(0.0)

    regions = Regions("rest", settle, clock)
    with regions.within("head"):
        queued[0] += 3
    regions.become("data")
    queued[0] += 5
    assert regions.stop() == {"rest": 0.0, "head": 3.0, "data": 5.0}
