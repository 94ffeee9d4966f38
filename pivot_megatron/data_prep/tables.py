"""Files of rows: a JSON list, JSON lines, or parquet."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pyarrow
import pyarrow.parquet as parquet

from pivot_megatron.errors import UserError

_COLUMNS = ("id", "image", "conversations", "data_source")
# Rows of images are held at once; a parquet file's own batches may hold thousands.
_BATCH_ROWS = 32


class Table(Protocol):
    """Rows by position. `name` tells a person, and the keys, which table it is."""

    name: str
    files: Sequence[Path]

    def __len__(self) -> int: ...

    def read(self, wanted: Sequence[bool]) -> Iterator[tuple[int, Any]]:
        """(position, row) of every `wanted` position, in order; a row that is no JSON object is the text that was found."""
        ...


def open_table(path: Path) -> Table:
    """A table of the kind its content says. A folder's parquet files are one table, in order of name. Raises UserError."""
    if path.is_dir():
        files = sorted(path.glob("*.parquet"))
        if not files:
            raise UserError(f"expected parquet files in {path}, found none: give the folder that holds them, or a file")
        return ParquetTable(path.name, files)
    if not path.is_file():
        raise UserError(f"expected a json, jsonl or parquet file at {path}, found none: check the path")
    if path.suffix == ".parquet":
        return ParquetTable(path.stem, [path])
    # Published files are named .json and hold lines, and the other way round.
    return ListTable(path) if _first_character(path) == "[" else LinesTable(path)


class ListTable:
    """One JSON list. It is read whole, for each use anew: many files of a mixture need not fit in memory together."""

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        self.files: Sequence[Path] = [path]
        self._path = path
        self._rows = len(self._load())

    def __len__(self) -> int:
        return self._rows

    def read(self, wanted: Sequence[bool]) -> Iterator[tuple[int, Any]]:
        for position, (row, wants) in enumerate(zip(self._load(), wanted, strict=True)):
            if wants:
                yield position, row

    def _load(self) -> list[Any]:
        try:
            rows = json.loads(self._path.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"expected JSON in {self._path}, found something else ({error}): fetch it again") from error
        assert isinstance(rows, list)  # it begins with a bracket
        return rows


class LinesTable:
    """One JSON object a line; empty lines do not count."""

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        self.files: Sequence[Path] = [path]
        self._path = path
        self._rows = sum(1 for _ in self._lines())

    def __len__(self) -> int:
        return self._rows

    def read(self, wanted: Sequence[bool]) -> Iterator[tuple[int, Any]]:
        for position, (line, wants) in enumerate(zip(self._lines(), wanted, strict=True)):
            if wants:
                yield position, json_line(line)

    def _lines(self) -> Iterator[bytes]:
        with self._path.open("rb") as file:
            yield from (line for line in file if line.strip())


class ParquetTable:
    """Parquet files one after another, as Hugging Face cuts a split. Columns other than LLaVA's are not read."""

    def __init__(self, name: str, files: Sequence[Path]) -> None:
        self.name, self.files = name, files
        self._groups: list[tuple[Path, int, int]] = []
        for path in files:
            with _readable(path), parquet.ParquetFile(path) as file:
                if "conversations" not in file.schema_arrow.names:
                    raise UserError(
                        f"expected columns {', '.join(_COLUMNS)} in {path}, found {', '.join(file.schema_arrow.names)}"
                    )
                meta = file.metadata
                self._groups += [(path, i, meta.row_group(i).num_rows) for i in range(meta.num_row_groups)]

    def __len__(self) -> int:
        return sum(rows for _, _, rows in self._groups)

    def read(self, wanted: Sequence[bool]) -> Iterator[tuple[int, Any]]:
        start = 0
        for path, group, rows in self._groups:
            if any(wanted[start : start + rows]):
                for position, row in enumerate(_rows_of(path, group), start):
                    if wanted[position]:
                        yield position, row.as_py()
            start += rows


def json_line(line: bytes) -> Any:
    """What a line holds, or, where it is no JSON, its text: rows are refused one by one, not with their file."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line[:80].decode("utf-8", "replace").strip()


def _rows_of(path: Path, group: int) -> Iterator[Any]:
    with _readable(path), parquet.ParquetFile(path) as file:
        columns = [name for name in _COLUMNS if name in file.schema_arrow.names]
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns):
            yield from batch.to_struct_array()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        detail = str(error).splitlines()[0]
        raise UserError(f"expected parquet in {path}, found something else ({detail}): fetch it again") from error


def _first_character(path: Path) -> str:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        while character := file.read(1):
            if not character.isspace():
                return character
    raise UserError(f"expected a JSON list or JSON lines in {path}, found an empty file: fetch it again")
