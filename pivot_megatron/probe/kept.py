"""Arrays kept in files, each by what it was made of."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

Features = npt.NDArray[np.float32]


def kept(work: Callable[[], Features], cache: Path | None, told: str) -> Features:
    """What `work` returned, now or when it was asked for with an equal `told` before. A file that cannot be read is made anew;
    several processes may make the same one at once."""
    if cache is None:
        return work()
    file = cache / f"{hashlib.sha256(told.encode()).hexdigest()[:32]}.npy"
    try:
        found: Features = np.load(file)
    except (OSError, ValueError, EOFError):
        found = work()
        _write(file, found)
    return found


def _write(file: Path, array: Features) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{uuid.uuid4().hex}.part")
    try:
        with part.open("wb") as out:
            np.save(out, array)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
