"""Rows of an image and its mask in parquet files, a row group in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pivot_megatron.errors import UserError

IMAGE_COLUMN = "image"
MASK_COLUMNS = ("annotation", "mask", "label")


@dataclass(frozen=True)
class ParquetRows:
    """`groups`: (file, row group of it, its first row's number in the file). `firsts`: number of each group's first row in all
    files, then of all rows. `mask_column`: one of `MASK_COLUMNS`."""

    groups: tuple[tuple[Path, int, int], ...]
    firsts: tuple[int, ...]
    mask_column: str
    _group: Any = field(repr=False)

    @classmethod
    def opened(cls, files: Sequence[Path]) -> ParquetRows:
        """Raises UserError for a file that is no parquet, or without these columns, and where there are no rows."""
        groups: list[tuple[Path, int, int]] = []
        counts: list[int] = []
        mask_columns = {file: _mask_column(file) for file in files}
        for file, column in mask_columns.items():
            if column != mask_columns[files[0]]:
                raise UserError(f"{file}: expected a column {mask_columns[files[0]]} as in {files[0]}, found {column}")
            told = _opened(file).metadata
            rows = [told.row_group(n).num_rows for n in range(told.num_row_groups)]
            groups += [(file, n, sum(rows[:n])) for n in range(len(rows))]
            counts += rows
        if not sum(counts):
            raise UserError(f"{files[0]}: expected images, found no rows")
        mask_column = mask_columns[files[0]]

        @lru_cache(maxsize=1)
        def group(file: Path, number: int) -> Any:
            try:
                return _opened(file).read_row_group(number, columns=[IMAGE_COLUMN, mask_column])
            except (pa.ArrowException, OSError) as error:
                raise _unreadable(file, error) from None

        return cls(tuple(groups), tuple(accumulate(counts, initial=0)), mask_column, group)

    def __len__(self) -> int:
        return self.firsts[-1]

    def name(self, row: int) -> str:
        (file, _, first), within = self._at(row)
        return f"{file}: row {first + within}"

    def read(self, row: int, column: str) -> bytes:
        """Raises UserError where there are no bytes."""
        (file, number, _), within = self._at(row)
        cell = self._group(file, number)[column][within].as_py()
        found = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(found, bytes):
            raise UserError(f"{self.name(row)}: {column}: expected an encoded image, found no bytes")
        return found

    def _at(self, row: int) -> tuple[tuple[Path, int, int], int]:
        group = int(np.searchsorted(self.firsts, row, side="right")) - 1
        return self.groups[group], row - self.firsts[group]


def _opened(file: Path) -> Any:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: Exception) -> UserError:
    (reason, *_) = str(error).splitlines() or [type(error).__name__]
    return UserError(f"{file}: not a parquet file that can be read ({reason}); fetch it again")


def _mask_column(file: Path) -> str:
    columns = {column.name: column.type for column in _opened(file).schema_arrow}
    found = [name for name in MASK_COLUMNS if name in columns and _holds_bytes(columns[name])]
    if IMAGE_COLUMN not in columns or not _holds_bytes(columns[IMAGE_COLUMN]) or not found:
        raise UserError(
            f"{file}: expected encoded images in columns {IMAGE_COLUMN} and {' or '.join(MASK_COLUMNS)}, found the columns "
            f"{', '.join(f'{name} ({kind})' for name, kind in columns.items())}"
        )
    return found[0]


def _holds_bytes(kind: Any) -> bool:
    """As datasets' Image feature is stored, or bytes alone."""
    if pa.types.is_struct(kind):
        return any(kind.field(n).name == "bytes" and _holds_bytes(kind.field(n).type) for n in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
