"""Whether Transformer Engine, where it is installed, also loads."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache

from pivot_megatron.errors import in_a_line

_PACKAGE = "transformer_engine"


@cache
def engine_fault() -> str | None:
    """Why an installed Transformer Engine does not load, for one that was built for another torch or CUDA is found all the same;
    None where it loads, and where there is none.

    One that does not load is as good as absent from then on: megatron-core imports it wherever it is found, in parts, and would
    stop at it. So this is asked before megatron-core is imported.
    """
    if importlib.util.find_spec(_PACKAGE) is None:
        return None
    try:
        importlib.import_module(f"{_PACKAGE}.pytorch")
    except Exception as error:  # of an import, of a library that cannot be loaded, of a check of its own
        for name in [name for name in sys.modules if name.partition(".")[0] == _PACKAGE]:
            del sys.modules[name]
        sys.modules[_PACKAGE] = None  # type: ignore[assignment]  # Python's way to say that there is none
        return in_a_line(error)
    return None
