"""Differences between megatron-core 0.16 and 0.19, isolated."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec


def mlp_spec(submodules: MLPSubmodules) -> Any:
    """A layer spec's `mlp`: 0.16 builds a ModuleSpec, 0.19 calls a builder."""
    builder = getattr(MLP, "as_mlp_submodule", None)
    return (
        functools.partial(builder, submodules=submodules) if builder else ModuleSpec(module=MLP, submodules=submodules)
    )


def accepted(function: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """Those of `options` that this release's `function` has a parameter for."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in known}
