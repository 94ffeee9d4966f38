"""Where in a checkpoint's files its tensors lie, and that what is read of them is what was written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader

from pivot_megatron.checkpoints.folder import opened
from pivot_megatron.checkpoints.manifest import Block, blocks_of_range
from pivot_megatron.errors import UserError
from pivot_megatron.families.table import MASTERS, layer_key
from pivot_megatron.runtime.distributed import gather_objects

_COMMON = "common_state/"
"""Where megatron-core 0.19 keeps what is no tensor, among them; 0.16 has a small file of it."""


def stored_tensors(checkpoint: Path) -> Mapping[str, Any]:
    """Of each key what torch's index says of it: shape, dtype, and the chunks that it was saved in."""
    found: Mapping[str, Any] = FileSystemReader(checkpoint / "tensors").read_metadata().state_dict_metadata
    return found


def master_place(stored: Mapping[str, Any], key: str, layer: int | None) -> tuple[str, int | None] | None:
    """Under which key, and as which entry of its first axis, if any, the float32 numbers behind `layer` of the weight `key` are
    `stored`. None where they are not, or the weight is float32 itself."""
    if key in stored and stored[key].properties.dtype == torch.float32:
        return None
    master = MASTERS + key
    if _has_layer(stored.get(master), layer):
        return master, layer
    if layer is not None and (own := layer_key(master, layer)) in stored:
        return own, None
    return None


def _has_layer(stored: Any, layer: int | None) -> bool:
    return stored is not None and (layer is None or any(chunk.offsets[0] == layer for chunk in stored.chunks))


def require_sound(checkpoint: Path, *prefixes: str) -> None:
    """Every file has its size, and what is stored under names that begin with one of `prefixes`, or all of it, its checksums.

    The ranks share the reading, and all raise the same UserError. Collective over all ranks.
    """
    manifest = opened(checkpoint)
    if prefixes:
        blocks = _blocks_of(checkpoint, lambda name: name.startswith((*prefixes, _COMMON)))
    else:
        blocks = manifest.blocks(manifest.files)
    problem = None
    try:
        manifest.require_sound(checkpoint, blocks[dist.get_rank() :: dist.get_world_size()])
    except UserError as error:
        problem = str(error)
    for found in gather_objects(problem):
        if found is not None:
            raise UserError(found)


def require_common_sound(checkpoint: Path) -> None:
    """The same of what is no tensor, by this process alone."""
    opened(checkpoint).require_sound(checkpoint, _blocks_of(checkpoint, lambda name: name.startswith(_COMMON)))


def _blocks_of(checkpoint: Path, wanted: Callable[[str], bool]) -> list[Block]:
    """Those that hold anything of a wanted name. The index was checked when the checkpoint was opened."""
    stored = FileSystemReader(checkpoint / "tensors").read_metadata().storage_data
    found: set[Block] = set()
    for item, place in stored.items():
        if wanted(item.fqn):
            found.update(blocks_of_range(f"tensors/{place.relative_path}", place.offset, place.length))
    return sorted(found)
