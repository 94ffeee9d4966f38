"""`pivot data index`: every sample of a folder's tars looked at, and the index written, or compared with what it says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pivot_megatron.data.index import Index, TarIndex, index_tar, read_index, tars_of, write_index
from pivot_megatron.data.sample import BadSample
from pivot_megatron.data.storage import LocalFolder
from pivot_megatron.data_prep.parallel import in_order
from pivot_megatron.data_prep.progress import track

_SHOWN = 20


@dataclass(frozen=True)
class Indexed:
    """What was found. `changed`: in which tars differ from the index that was compared with."""

    folder: Path
    tars: int
    samples: int
    bytes: int
    bad: tuple[BadSample, ...]
    ignored: Counter[str]
    changed: tuple[str, ...]

    @property
    def sound(self) -> bool:
        return not self.bad and not self.changed

    def as_record(self) -> dict[str, Any]:
        """For a script."""
        return {
            "folder": str(self.folder),
            "tars": self.tars,
            "samples": self.samples,
            "bytes": self.bytes,
            "bad": [{"key": bad.key, "reason": bad.reason, "detail": bad.detail} for bad in self.bad],
            "ignored": dict(self.ignored),
            "changed": list(self.changed),
        }

    def as_lines(self) -> list[str]:
        """For a person."""
        lines = [f"{self.folder}: {self.samples} samples in {self.tars} tars, {self.bytes / 2**20:.1f} MiB"]
        lines += [f"left alone: {count} members {kind}" for kind, count in sorted(self.ignored.items())]
        lines += [f"changed: {line}" for line in self.changed]
        if self.bad:
            reasons = Counter(bad.reason for bad in self.bad).most_common()
            lines.append(f"broken: {len(self.bad)}: {', '.join(f'{count} {reason}' for reason, count in reasons)}")
            lines += [f"  {bad}" for bad in self.bad[:_SHOWN]]
            if len(self.bad) > _SHOWN:
                lines.append(f"  and {len(self.bad) - _SHOWN} more; --json names all")
            lines.append("a run refuses them, unless it has data.on_bad_sample: skip")
        return lines


def index_folder(folder: Path, workers: int, check: bool) -> Indexed:
    """Read and decode every sample of a folder's tars in `workers` processes. Writes the index; with `check`, compares with it.

    Raises UserError where there are no tars, or no index to compare with.
    """
    tars = tars_of(folder)
    before = read_index(LocalFolder(folder)) if check else None
    parts = list(track(in_order(partial(index_tar, decode=True), tars, workers, chunk=1), len(tars), "tars indexed"))
    changed = tuple(_changes(before, parts)) if before else ()
    index = write_index(folder, parts) if before is None else before
    bad = _bad(index) if before is None else _found_bad(parts)
    ignored = sum((part.ignored for part in parts), Counter[str]())
    return Indexed(folder, len(tars), len(index.keys), sum(p.shard.bytes for p in parts), bad, ignored, changed)


def _bad(index: Index) -> tuple[BadSample, ...]:
    return tuple(BadSample(index.keys[at], p.reason, p.detail) for at, p in sorted(index.problems.items()))


def _found_bad(parts: Sequence[TarIndex]) -> tuple[BadSample, ...]:
    members = [entry.member for part in parts for entry in part.entries]
    return tuple(BadSample(m.key, m.problem.reason, m.problem.detail) for m in members if m.problem)


def _changes(before: Index, parts: Sequence[TarIndex]) -> list[str]:
    return [
        f"{was.name}: expected SHA-256 {was.sha256[:16]}, found {part.shard.sha256[:16]}; copy it again, or index again"
        for was, part in zip(before.shards, parts, strict=True)
        if was.sha256 != part.shard.sha256
    ]
