"""The tables of a LLaVA-like command: files, folders of parquet, and mixtures of them written as YAML."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import yaml

from pivot_megatron.data_prep.llava import LlavaRows, Part
from pivot_megatron.data_prep.rows import require_folder
from pivot_megatron.data_prep.sampling import cap, select, weigh
from pivot_megatron.data_prep.tables import open_table
from pivot_megatron.errors import UserError

_KEYS = ("json_path", "sampling_strategy", "images", "weight", "cap")


@dataclass(frozen=True)
class _Entry:
    """One table of a mixture; `where` names it in errors. First the strategy counts, then the weight, then the cap."""

    where: str
    path: Path
    strategy: str = "all"
    images: Path | None = None
    weight: float = 1.0
    cap: int | None = None


def open_llava(paths: Sequence[Path], images: Path | None, strategy: str, seed: int) -> LlavaRows:
    """The rows of `paths`, in that order: tables (`open_table`), folders with parquet at any depth, and YAML mixtures.

    `images` is where image paths start for tables whose mixture names no folder of their own; left out, it is the
    table's folder. `strategy` is that of tables named without a mixture. Whatever is random is drawn from `seed` and the
    table's place in the list. Raises UserError.
    """
    if images is not None:
        require_folder(images, "--images")
    entries = [entry for path in paths for entry in _entries(path, strategy)]
    rows = LlavaRows([_part(entry, images, Random(f"{seed}:{i}")) for i, entry in enumerate(entries)])
    if not len(rows):
        raise UserError(f"expected rows in {', '.join(map(str, paths))}, found none: check the files and what is taken")
    return rows


def _part(entry: _Entry, images: Path | None, rng: Random) -> Part:
    table = open_table(entry.path)
    times = weigh(select(len(table), entry.strategy, rng, entry.where), entry.weight, rng)
    if entry.cap is not None:
        times = cap(times, entry.cap, rng)
    return Part(table, times, entry.images or images or table.files[0].parent)


def _entries(path: Path, strategy: str) -> Iterator[_Entry]:
    if path.suffix in (".yaml", ".yml"):
        yield from _mixture(path)
    elif path.is_dir():
        folders = sorted({file.parent for file in path.rglob("*.parquet")})
        yield from (_Entry("--sampling", folder, strategy) for folder in folders or [path])
    else:
        yield _Entry("--sampling", path, strategy)


def _mixture(path: Path) -> Iterator[_Entry]:
    if not path.is_file():
        raise UserError(f"expected a mixture at {path}, found none: check the path")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        detail = " ".join(str(error).split())
        raise UserError(f"expected YAML in {path}, found something else ({detail})") from error
    rows = found.get("datasets") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not rows:
        raise UserError(
            f"expected 'datasets', a list of entries with json_path, in {path}, found {type(rows).__name__}"
        )
    for number, row in enumerate(rows):
        yield _entry(row, f"{path}: datasets[{number}]", path.parent)


def _entry(row: Any, where: str, folder: Path) -> _Entry:
    """Paths are relative to the mixture's folder."""
    if not isinstance(row, dict) or not isinstance(row.get("json_path"), str):
        raise UserError(f"{where}: expected json_path, the path of a json, jsonl or parquet file, found {row!r}")
    unknown = [str(key) for key in row if key not in _KEYS]
    if unknown:
        raise UserError(f"{where}: expected keys of {', '.join(_KEYS)}, found {unknown[0]}")
    images = row.get("images")
    if images is not None and not isinstance(images, str):
        raise UserError(f"{where}.images: expected a folder, found {images!r}")
    return _Entry(
        f"{where}.sampling_strategy",
        folder / row["json_path"],
        str(row.get("sampling_strategy", "all")),
        None if images is None else require_folder(folder / images, f"{where}.images"),
        _number(row, "weight", 1.0, where),
        None if row.get("cap") is None else int(_number(row, "cap", 0, where)),
    )


def _number(row: Mapping[str, Any], name: str, default: float, where: str) -> float:
    value = row.get(name, default)
    whole = name == "cap"
    if (
        isinstance(value, bool)
        or not isinstance(value, int if whole else int | float)
        or not 0 <= value < 1e6 ** (1 + whole)
    ):
        raise UserError(f"{where}.{name}: expected a {'whole ' * whole}number of at least 0, found {value!r}")
    return float(value)
