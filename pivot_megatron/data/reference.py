"""Reference log-probs beside the shards: one Parquet file a model, a row a sample, found again by position and by content.

`reference-<digest>.parquet` is named by the model that it was computed with and by how samples reach it, so those of several
models, templates or image backends lie side by side. Its columns: `key`; `tokens` and `images`, digests of everything the
log-probs were computed over; `chosen` and `rejected`, the log-probs of each answer's tokens, null where the sample was left out.
Its metadata hold `Facts`.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pivot_megatron.data.tokens import Tokenized
from pivot_megatron.errors import RunError, UserError

VERSION = 2
_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("tokens", pa.binary(16)),
        ("images", pa.binary(16)),
        ("chosen", pa.list_(pa.float32())),
        ("rejected", pa.list_(pa.float32())),
    ]
)
_METADATA = b"pivot"
_SECONDS = b"pivot seconds"


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Facts:
    """What reference log-probs follow from: the model, by parts; `data`, how samples reach it; `shards`, which those are. Samples
    that take more than `sequence_length` tokens have none."""

    model: Mapping[str, str]
    data: Mapping[str, str]
    shards: str
    sequence_length: int

    @property
    def name(self) -> str:
        """The same for any length: what had room at one has the same log-probs at another. The same for any shards, beside which
        it lies: a file of what they were before is stale."""
        return f"reference-{_digest([dict(self.model), dict(self.data)])}.parquet"

    @property
    def parts(self) -> str:
        """The folder of the parts of a file that is being made: not that of a run whose samples reach the model otherwise."""
        return f"{self.name}.{_digest(asdict(self))}.parts"


@dataclass(frozen=True)
class Row:
    """`tokens`: `Tokenized.digest`. `images`: `images_digest`. `chosen`, `rejected`: log-probs of the answers' tokens; None for a
    sample that does not fit."""

    key: str
    tokens: bytes
    images: bytes
    chosen: Sequence[float] | None
    rejected: Sequence[float] | None


def images_digest(images: Sequence[bytes]) -> bytes:
    """16 bytes that name a sample's images, of the digests of each as it lies in the shards, in the order of their places."""
    return hashlib.blake2b(b"".join(images), digest_size=16).digest()


def write_rows(path: Path, rows: Sequence[Row], facts: Facts, seconds: float) -> None:
    """Write `path`, whole or not at all. `seconds`: how long the pass over `rows` took."""
    _write(pa.Table.from_pylist([vars(row) for row in rows], schema=_schema(facts, seconds)), path, path.parent)


def _write(table: Any, path: Path, scratch: Path) -> None:
    """`scratch`: a folder of the same disk, where what is not whole yet lies under a name that no other run has."""
    part = scratch / f"{uuid.uuid4().hex}.part"
    try:
        pq.write_table(table, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _schema(facts: Facts, seconds: float) -> Any:
    return _SCHEMA.with_metadata({_METADATA: _told(facts), _SECONDS: str(seconds).encode()})


def pass_seconds(path: Path) -> float:
    """How long the reference pass took that made `path`."""
    return float(pq.read_schema(path).metadata[_SECONDS])


def _told(facts: Facts) -> bytes:
    return json.dumps({"version": VERSION, **asdict(facts)}).encode()


def is_made_with(path: Path, facts: Facts) -> bool:
    """Whether `path` is there, can be read and holds rows made with `facts`."""
    try:
        return bool((pq.read_schema(path).metadata or {}).get(_METADATA) == _told(facts))
    except (OSError, ValueError):
        return False


def join(parts: Sequence[Path], path: Path, facts: Facts) -> None:
    """One file of several with the same `facts`, in order; written beside the first of them."""
    table = pa.concat_tables([pq.read_table(p) for p in parts])
    schema = _schema(facts, sum(pass_seconds(p) for p in parts))
    _write(table.replace_schema_metadata(schema.metadata), path, parts[0].parent)


class ReferenceFile:
    """The reference log-probs of one folder of shards, for a run of the given facts and keys.

    Raises UserError, naming what differs, where the file was made from something else or is not complete.
    """

    def __init__(self, path: Path, facts: Facts, keys: Sequence[str]) -> None:
        self.path = path
        try:
            table = pq.read_table(path)
            about = json.loads(table.schema.metadata[_METADATA])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a whole file of reference log-probs ({error}); {self._remedy}") from None
        self._require_facts(about, facts)
        self._made_at = int(about["sequence_length"])
        if table.column("key").to_pylist() != list(keys):
            raise UserError(
                f"{path}: incomplete: expected {len(keys)} samples, the keys of the shards in order, found {len(table)}; "
                f"{self._remedy}"
            )
        self._tokens, self._images = (table.column(name).to_pylist() for name in ("tokens", "images"))
        self._answers = [_Lists(table.column(name).combine_chunks()) for name in ("chosen", "rejected")]

    @property
    def _remedy(self) -> str:
        return "delete it and run `pivot reference` again"

    def _require_facts(self, about: Mapping[str, Any], facts: Facts) -> None:
        if about.get("version") != VERSION:
            raise UserError(f"{self.path}: expected version {VERSION}, found {about.get('version')}; {self._remedy}")
        expected, told = ({**one["model"], **one["data"], "shards": one["shards"]} for one in (asdict(facts), about))
        for name, value in expected.items():
            if told.get(name) != value:
                raise UserError(
                    f"{self.path}: stale: made with {name} {told.get(name)}, this run has {value}; {self._remedy}, or "
                    f"restore {name}"
                )

    def require_room(self, positions: npt.NDArray[np.int64], sequence_length: int) -> None:
        """Raises UserError where one of these samples was left out for its length, and may have room in `sequence_length`."""
        if sequence_length <= self._made_at:
            return
        left_out = int((~self._answers[0].valid[positions]).sum())
        if left_out:
            raise UserError(
                f"{self.path}: made at a sequence_length of {self._made_at}, which left out {left_out} of this run's "
                f"{len(positions)} samples; this run has {sequence_length}: {self._remedy}, or restore sequence_length"
            )

    def logprobs(self, position: int, sample: Tokenized, images: bytes | None = None) -> Tensor:
        """`[N]` float32: those of the predicted tokens of `sample`'s branches, one after another. `images`: its `images_digest`,
        None where its images are not read. Raises RunError where it is not the sample that they were made of."""
        answers = [answer.at(position) for answer in self._answers[: len(sample.branches)]]
        if any(answer is None for answer in answers):
            raise RunError(
                f"{self.path}: stale: sample {sample.key} was left out when it was made, and is not now; {self._remedy}"
            )
        if self._tokens[position] != sample.digest:
            raise RunError(
                f"{self.path}: stale: sample {sample.key} has other tokens than when it was made; {self._remedy}"
            )
        if images is not None and self._images[position] != images:
            raise RunError(
                f"{self.path}: stale: sample {sample.key} has another image than when it was made, so its tar was changed; "
                "restore that, or run `pivot data index` and `pivot reference` again"
            )
        return torch.from_numpy(np.concatenate([a for a in answers if a is not None]))


class _Lists:
    """A column of lists as two arrays: 150 thousand small Python lists would take ten times the memory."""

    def __init__(self, column: Any) -> None:
        self._ends = column.offsets.to_numpy()
        self._values = column.values.to_numpy()
        self.valid = column.is_valid().to_numpy(zero_copy_only=False)

    def at(self, row: int) -> np.ndarray | None:
        return self._values[self._ends[row] : self._ends[row + 1]] if self.valid[row] else None
