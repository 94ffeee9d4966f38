"""Arrays kept in files, each by what it was made of."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Features = npt.NDArray[np.float32]
Array = TypeVar("Array", bound=npt.NDArray[Any])


def kept(work: Callable[[], Array], cache: Path | None, told: str, mapped: bool = False) -> Array:
    """What `work` returned, now or when it was asked for with an equal `told` before. A file that cannot be read is made anew;
    several processes may make the same one at once. `mapped`: left in its file and read from there as it is used; what is in no
    file stands in memory."""
    if cache is None:
        return work()
    file = kept_file(cache, told)
    try:
        found: Array = _read(file, mapped)
    except (OSError, ValueError, EOFError):
        found = work()
        _write(file, found)
        return _read(file, mapped) if mapped else found  # type: ignore[no-any-return]
    return found


def kept_file(cache: Path, told: str) -> Path:
    """Where `kept` keeps what `told` tells of."""
    return cache / f"{hashlib.sha256(told.encode()).hexdigest()[:32]}.npy"


def _read(file: Path, mapped: bool) -> Any:
    return np.load(file, mmap_mode="r" if mapped else None)


def _write(file: Path, array: npt.NDArray[Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{uuid.uuid4().hex}.part")
    try:
        with part.open("wb") as out:
            np.save(out, array)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
