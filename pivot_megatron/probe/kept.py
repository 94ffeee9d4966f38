"""Arrays kept in files, each by what it was made of."""

from __future__ import annotations

import hashlib
import uuid
import zipfile
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from pivot_megatron.train.run_folder import installed_version

Features = npt.NDArray[np.float32]
Arrays = Mapping[str, npt.NDArray[Any]]
Array = TypeVar("Array", bound=npt.NDArray[Any])


def kept(work: Callable[[], Array], folder: Path | None, told: str, mapped: bool = False) -> Array:
    """What `work` returned, now or when it was asked for with an equal `told` before. A file that cannot be read is made anew;
    several processes may make the same one at once. `mapped`: left in its file and read from there as it is used; what is in no
    file stands in memory."""
    if folder is None:
        return work()
    file = kept_file(folder, told)
    try:
        found: Array = _read(file, mapped)
    except (OSError, ValueError, EOFError):
        found = work()
        _write(file, partial(np.save, arr=found))
        return _read(file, mapped) if mapped else found  # type: ignore[no-any-return]
    return found


def kept_together(work: Callable[[], Arrays], folder: Path | None, told: str) -> Arrays:
    """As `kept`, of several arrays by name, in one file."""
    if folder is None:
        return work()
    file = kept_file(folder, told).with_suffix(".npz")
    try:
        with np.load(file) as stored:
            return dict(stored)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        found = work()
        _write(file, lambda out: np.savez(out, **found))  # type: ignore[arg-type]  # for its own `allow_pickle`
        return found


def kept_file(folder: Path, told: str) -> Path:
    """Where `kept` keeps what `told` tells of."""
    return folder / f"{hashlib.sha256(told.encode()).hexdigest()[:32]}.npy"


@cache
def made_by(*what: str) -> str:
    """The contents of source files and modules of this project, and versions of installed packages: what they make is made anew
    where one of them differs."""
    told = [
        installed_version(one) if source is None else hashlib.sha256(source.read_bytes()).hexdigest()
        for one in what
        for source in [_source(one)]
    ]
    return " ".join(map(str, told))


def _source(what: str) -> Path | None:
    """The file of a module of this project, or the source file that `what` is itself. None of a package's name."""
    if what.endswith(".py"):
        return Path(what)
    spec = find_spec(what) if what.startswith("pivot_megatron.") else None
    return Path(spec.origin) if spec and spec.origin else None


def digest_of(*arrays: npt.NDArray[Any]) -> str:
    """Equal for arrays of the same types, shapes and values."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{array.dtype} {array.shape} ".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def _read(file: Path, mapped: bool) -> Any:
    return np.load(file, mmap_mode="r" if mapped else None)


def _write(file: Path, save: Callable[[Any], None]) -> None:
    """`save`: into an open file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{uuid.uuid4().hex}.part")
    try:
        with part.open("wb") as out:
            save(out)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
