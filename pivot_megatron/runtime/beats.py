"""What processes tell of themselves while they run, and what follows from it: who is gone, and who holds the others up."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

_NAMED = 4  # ranks that one line lists


@dataclass(frozen=True)
class Beat:
    """A sign of life. `place` counts what the process has begun, the same things in the same order on every rank; `seconds` is
    how long it has been at the last of them, `patience` how long it may be, by the config's key
    `limit`. `lost`: a collective of its own has failed.
    `ended`: why it left, where it did."""

    number: int
    place: int
    step: int
    phase: str
    seconds: float
    patience: float
    limit: str
    host: str
    lost: bool = False
    ended: str = ""

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Beat:
        return cls(**json.loads(text))

    @property
    def standing(self) -> str:
        return f"step {self.step}, {self.phase}" if self.step else self.phase


@dataclass(frozen=True)
class Heard:
    """A rank's newest beat, and for how many seconds none has followed."""

    rank: int
    beat: Beat
    silent: float


def find_fault(heard: Sequence[Heard], silence: float) -> str | None:
    """What is wrong with the ranks, in words that name those to blame; None while all is well. `silence`: seconds after which a
    rank without a sign of life is gone.

    Of ranks that live, those that have come least far are judged: the others may be waiting for them. Among those, too, whoever
    came first may be waiting for the last, and so none is stuck before the last one's patience is over.
    """
    gone = [one for one in heard if one.silent > silence]
    if left := [one for one in gone if one.beat.ended]:
        return f"{_names(left)} ended: {left[0].beat.ended}"
    if gone:
        return f"{_names(gone)} gave no sign of life for {gone[0].silent:.0f} s; last seen at {gone[0].beat.standing}"
    least = min(one.beat.place for one in heard)
    behind = [one for one in heard if one.beat.place == least]
    last = min((one.beat for one in behind), key=lambda beat: beat.seconds - beat.patience)
    if last.seconds <= last.patience:
        return None
    where, limit = f"{last.standing} for {last.seconds:.0f} s", f" ({last.limit})"
    if len(behind) == len(heard) > 1:
        return f"all {len(heard)} ranks have been at {where}, none of them behind the others{limit}"
    waiting = ", and the others wait" if len(heard) > 1 else ""
    return f"{_names(behind)} has been at {where}{waiting}{limit}"


def _names(ranks: Sequence[Heard]) -> str:
    named = ", ".join(f"rank {one.rank} on {one.beat.host}" for one in ranks[:_NAMED])
    return named if len(ranks) <= _NAMED else f"{named} and {len(ranks) - _NAMED} more"
