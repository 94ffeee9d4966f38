"""Where things are kept that can be made again: below `XDG_CACHE_HOME`, or else the home's `.cache`."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """Of one kind of things. It need not be there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pivot-megatron" / kind
