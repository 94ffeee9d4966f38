"""All ranks agree to stop where any of them was asked to."""

from __future__ import annotations

from collections.abc import Mapping
from signal import Signals

from pivot_megatron.requeue import SIGNALS, StopRequests
from pivot_megatron.runtime.distributed import sum_over_ranks


class Stopped(Exception):
    """Raised on every rank alike: the run was asked to stop before it had anything to save."""

    def __init__(self, signal: Signals) -> None:
        super().__init__(signal.name)
        self.signal = signal


def as_tally(requests: StopRequests) -> dict[str, float]:
    """What this process was asked, to be summed over all ranks."""
    return {one.name: float(requests.signal == one) for one in SIGNALS}


def in_tally(tally: Mapping[str, float]) -> Signals | None:
    """What any rank was asked."""
    return next((one for one in SIGNALS if tally[one.name]), None)


def agreed_signal(requests: StopRequests) -> Signals | None:
    """Collective over all ranks."""
    return in_tally(sum_over_ranks(as_tally(requests)))


def stop_if_asked(requests: StopRequests) -> None:
    """Raises Stopped. Collective over all ranks."""
    if (signal := agreed_signal(requests)) is not None:
        raise Stopped(signal)
