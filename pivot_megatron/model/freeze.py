"""Ordered patterns over parameter names: frozen, or a factor on the learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from pivot_megatron.config.schema import ParameterRule
from pivot_megatron.errors import UserError

Rate = float | Literal["frozen"]


def reaching(hidden: Tensor, block: torch.nn.Module) -> Tensor:
    """`hidden`, so that gradients reach what trains in `block` under full recompute.

    A checkpointed layer whose input needs no gradient gives an output that needs none, and what trains inside gets nothing:
    so it is where everything before it is frozen.
    """
    if hidden.requires_grad or not torch.is_grad_enabled() or not any(p.requires_grad for p in block.parameters()):
        return hidden
    return hidden.detach().requires_grad_()


def rate_of(name: str, rules: Sequence[ParameterRule]) -> Rate:
    """The first rule that matches `name`; 1.0 where none does."""
    for rule in rules:
        if fnmatchcase(name, rule.match):
            return rule.rate
    return 1.0


def require_matches(names: Sequence[str], rules: Sequence[ParameterRule]) -> None:
    """Raises UserError with all that `mismatches` finds."""
    if found := mismatches(names, rules):
        raise UserError("\n".join(found))


def mismatches(names: Sequence[str], rules: Sequence[ParameterRule]) -> list[str]:
    """A pattern that no parameter answers to is a typing error, and would train what was meant to stay frozen."""
    found = [
        f"parameters.{i}.match: no parameter is named like {rule.match!r}; names begin with encoder., projector. and llm., such "
        "as encoder.decoder.layers.0.mlp.linear_fc1.weight"
        for i, rule in enumerate(rules)
        if not any(fnmatchcase(name, rule.match) for name in names)
    ]
    if names and all(rate_of(name, rules) == "frozen" for name in names):
        found.append("parameters: every parameter is frozen, so there is nothing to train")
    return found
