"""The first look at every row: which are kept, and why the rest is not. Remembered on disk, so that it can go on."""

import json
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO

from pivot_megatron.data.chat import qwen_1_5, render
from pivot_megatron.data.sample import BadSample, parse_sample
from pivot_megatron.data_prep.parallel import in_order
from pivot_megatron.data_prep.pictures import PictureError, examine, read_picture
from pivot_megatron.data_prep.progress import track
from pivot_megatron.data_prep.rows import Check, Row, Source

_FIRST = 5
_FLUSH_EVERY = 256

Verdict = list[str] | dict[str, str]
"""Of a kept row, the changes its image needs; of another, its `key`, `reason` and `detail`."""


@dataclass
class Dropped:
    """Rows dropped for one reason: how many, the keys of the first few, and what was wrong with the first."""

    count: int
    first: list[str]
    example: str


@dataclass
class Survey:
    """`kept[i]`: whether the source's row i is written; rows past its end were not needed. `changes`: of kept images."""

    kept: list[bool] = field(default_factory=list)
    count: int = 0
    dropped: dict[str, Dropped] = field(default_factory=dict)
    changes: dict[str, int] = field(default_factory=dict)

    def add(self, verdict: Verdict) -> None:
        keeps = isinstance(verdict, list)
        self.kept.append(keeps)
        self.count += keeps
        if isinstance(verdict, list):
            for change in verdict:
                self.changes[change] = self.changes.get(change, 0) + 1
            return
        dropped = self.dropped.setdefault(verdict["reason"], Dropped(0, [], verdict["detail"]))
        dropped.count += 1
        if len(dropped.first) < _FIRST:
            dropped.first.append(verdict["key"])


def survey(source: Source, check: Check, limit: int | None, workers: int, journal: Path) -> Survey:
    """Look at rows, in order, until `limit` of them are kept, or at all.

    What `journal` already holds is taken as it is, and the rest is appended, a line a row. Raises RunError.
    """
    found = Survey()
    for verdict in _remembered(journal):
        found.add(verdict)
    rows = (_checked(row, check) for row in islice(source, len(found.kept), None))
    with journal.open("a", encoding="utf-8") as file, closing(in_order(_verdict, rows, workers)) as verdicts:
        fresh = _until(found, verdicts, limit, file)
        if limit is None:
            steps, left = fresh, len(source) - len(found.kept)
        else:
            steps, left = (verdict for verdict in fresh if isinstance(verdict, list)), limit - found.count
        for _ in track(steps, left, "rows looked at" if limit is None else "rows kept"):
            pass
    return found


def _remembered(journal: Path) -> list[Verdict]:
    """The whole lines; a line that was cut short when its writer was killed goes."""
    if not journal.exists():
        return []
    whole = journal.read_bytes().rpartition(b"\n")
    os.truncate(journal, len(whole[0]) + len(whole[1]))
    return [json.loads(line) for line in whole[0].splitlines()]


def _until(found: Survey, verdicts: Iterator[Verdict], limit: int | None, file: IO[str]) -> Iterator[Verdict]:
    while limit is None or found.count < limit:
        verdict = next(verdicts, None)
        if verdict is None:
            return
        found.add(verdict)
        file.write(json.dumps(verdict) + "\n")
        if len(found.kept) % _FLUSH_EVERY == 0:
            file.flush()
        yield verdict


def _checked(row: Row | BadSample, check: Check) -> Row | BadSample:
    """What a run would stop at is refused here: text that does not parse, and marks that no template has a place for."""
    if isinstance(row, Row):
        try:
            present = None if row.image is None else b""
            render(parse_sample(row.key, json.dumps(row.record).encode(), present), qwen_1_5)
            check(row)
        except BadSample as refusal:
            return refusal
    return row


def _verdict(row: Row | BadSample) -> Verdict:
    if isinstance(row, BadSample):
        return {"key": row.key, "reason": row.reason, "detail": row.detail}
    try:
        return [] if row.image is None else list(examine(read_picture(row.image)).changes)
    except PictureError as error:
        return {"key": row.key, "reason": error.reason, "detail": error.detail}
