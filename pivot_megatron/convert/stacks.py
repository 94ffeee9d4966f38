"""Layers of a stack lie in one tensor of a checkpoint, which torch's format takes whole or not at all; where some of them have
nothing to save, the others have a tensor each."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from pivot_megatron.families.table import layer_key

Sharded: TypeAlias = ShardedTensor | ShardedTensorFactory


def layer_of(sharded: Sharded) -> int | None:
    """Which entry of its key's first axis it is; None where it stands in no stack."""
    parts = [sharded] if isinstance(sharded, ShardedTensor) else nested_values(sharded.build())
    return next((part.global_offset[0] for part in parts if part.prepend_axis_num), None)


def alone(sharded: Any) -> Any:
    """A stack's layer as a tensor by itself, under `layer_key`; anything else as it is."""
    if isinstance(sharded, ShardedTensorFactory):
        build = sharded.build_fn
        return dataclasses.replace(sharded, build_fn=lambda *asked: dict_list_map_inplace(alone, build(*asked)))
    if not isinstance(sharded, ShardedTensor) or not sharded.prepend_axis_num:
        return sharded
    return dataclasses.replace(
        sharded,
        key=layer_key(sharded.key, sharded.global_offset[0]),
        global_shape=sharded.global_shape[1:],
        global_offset=sharded.global_offset[1:],
        axis_fragmentations=sharded.axis_fragmentations and sharded.axis_fragmentations[1:],
        prepend_axis_num=sharded.prepend_axis_num - 1,
    )


def all_alone(state: dict[str, Any]) -> dict[str, Any]:
    """The same of every tensor in `state`."""
    found: dict[str, Any] = dict_list_map_inplace(alone, state)
    return found
