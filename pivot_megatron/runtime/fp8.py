"""What FP8 GEMMs ask of a machine and of sizes. Transformer Engine alone has them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from pivot_megatron.config.schema import Fp8, Fp8Recipe
from pivot_megatron.errors import UserError
from pivot_megatron.runtime.device import current_platform
from pivot_megatron.runtime.engine import engine_fault

# Both sides of each weight of a tensor-parallel rank: cuBLAS takes FP8 matrices whose rows begin at multiples of 16 bytes, and a
# weight is read along either side, forward and backward.
WEIGHT_MULTIPLE = 16

# Tokens become rows when a weight's gradient is computed, hence 16 again. A `blockwise` scale spans 128 tokens there: ranks that
# hold other numbers gather activations in bf16 (and Transformer Engine says so with every step).
_TOKENS: Mapping[Fp8Recipe, int] = {"delayed": 16, "tensorwise": 16, "blockwise": 128}

_TRUST = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


def token_multiple(recipe: Fp8Recipe | None) -> int:
    """What the number of tokens of each tensor-parallel rank must divide by; None: layers that are not in FP8."""
    return 1 if recipe is None else _TOKENS[recipe]


def require_fp8(fp8: Fp8) -> None:
    """FP8 GEMMs exist in Transformer Engine's layers alone; without it megatron-core would ignore the setting in silence."""
    platform = current_platform()
    if not platform.transformer_engine:
        why = f" ({fault})" if platform.is_cuda and (fault := engine_fault()) else ""
        raise UserError(
            "precision.fp8: needs a CUDA device and transformer-engine, found neither in use on "
            f"{platform.device}{why}; install the `te` extra on a Hopper machine or set precision.fp8: null"
        )
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager as state

    possible, reason = state.is_fp8_block_scaling_available() if fp8.recipe == "blockwise" else state.is_fp8_available()
    if not possible:
        raise UserError(
            f"precision.fp8.recipe: {fp8.recipe} cannot run on {platform.device} ({' '.join(str(reason).split())}); "
            "use a Hopper GPU or newer, or set precision.fp8: null"
        )


@contextmanager
def own_statistics() -> Iterator[None]:
    """Within, Transformer Engine reads the scales and maxima of `delayed` from a checkpoint. They are a pickle, which it refuses
    unless told that the file is trusted: a run's own is, as its random state, of the same kind, is."""
    before = os.environ.get(_TRUST)
    os.environ[_TRUST] = "1"
    try:
        yield
    finally:
        os.environ.pop(_TRUST)
        if before is not None:
            os.environ[_TRUST] = before
