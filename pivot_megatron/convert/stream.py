"""Checkpoints written and read tensor by tensor, without a model: what stands in memory is one tensor and its parts.

megatron-core's own format: what is written here loads at any layout, and what any layout saved is read here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import (
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_saver import save

from pivot_megatron.checkpoints.folder import opened
from pivot_megatron.checkpoints.manifest import CheckedAhead, FileSum, Sum, blocks_of_range
from pivot_megatron.convert.stored import master_place
from pivot_megatron.errors import UserError
from pivot_megatron.families.table import checkpoint_place

Make = Callable[[], Tensor]


@dataclass(frozen=True)
class Parameter:
    """A whole parameter by its canonical name, `layers` of whose kind there are where it stands in layers. `make` gives it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layers: int
    make: Make


def sharded(parameter: Parameter) -> ShardedTensor:
    """Where megatron-core's models keep it, with no numbers."""
    key, layer = checkpoint_place(parameter.name)
    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    if layer is None:
        return ShardedTensor.from_rank_offsets(key, empty)
    return ShardedTensor.from_rank_offsets(key, empty, (0, layer, parameter.layers), prepend_axis_num=1)


def write_parameters(parameters: Sequence[Parameter], folder: Path, content: Mapping[str, Any]) -> dict[str, FileSum]:
    """Into an empty `folder`, one parameter in memory at a time. Returns the checksums of the files of tensors, taken as those
    are written: to read a large one again takes as long as to write it. `content`: megatron-core's content metadata, as it is
    saved.

    megatron-core's own save takes tensors that are there. Its format is torch's, a file of what is no tensor, and a note of
    which format it is; 0.19 would put the second into the first, and reads it either way.
    """
    tensors = [sharded(parameter) for parameter in parameters]
    makers = {_index(tensor): p.make for p, tensor in zip(parameters, tensors, strict=True)}
    writer = FileSystemWriter(folder, thread_count=1)
    writer.fs = summed = _SummedFiles()
    save({}, storage_writer=writer, planner=_Plan(tensors, makers), no_dist=True)
    torch.save({"content_metadata": dict(content)}, folder / "common.pt")
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    return {name: found.done() for name, found in summed.sums.items() if (folder / name).exists()}


class _SummedFiles(FileSystem):
    """Files whose checksums are taken as they are written."""

    def __init__(self) -> None:
        self.sums: dict[str, Sum] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            self.sums[Path(path).name] = found = Sum()
            yield _SummedStream(stream, found)


class _SummedStream:
    def __init__(self, stream: Any, found: Sum) -> None:
        self._stream, self._found = stream, found

    def write(self, data: Any) -> int:
        self._found.add(data)
        count: int = self._stream.write(data)
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _index(tensor: ShardedTensor) -> MetadataIndex:
    return MetadataIndex(tensor.key, torch.Size(tensor.global_offset))


class _Plan(DefaultSavePlanner):
    def __init__(self, tensors: Sequence[ShardedTensor], makers: Mapping[MetadataIndex, Make]) -> None:
        super().__init__(flatten_state_dict=False)
        self._tensors, self._makers = tensors, makers

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(tensor) for tensor in self._tensors])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        chunk = write_item.tensor_data.chunk  # type: ignore[union-attr]
        made = self._makers[MetadataIndex(write_item.index.fqn, chunk.offsets)]()
        return made.reshape(chunk.sizes)


def _write_item(tensor: ShardedTensor) -> WriteItem:
    offsets = torch.Size(tensor.global_offset)
    sizes = torch.Size([1] * tensor.prepend_axis_num + list(tensor.local_shape))
    return WriteItem(
        index=MetadataIndex(tensor.key, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets, sizes),
            properties=TensorProperties(dtype=tensor.dtype),
            size=torch.Size(tensor.global_shape),
        ),
    )


@dataclass(frozen=True)
class CheckpointParameters:
    """Whole parameters of a checkpoint's `tensors` folder by canonical name, whatever layout saved it.

    `masters`: where a 16-bit weight was trained, the float32 numbers that it is a rounding of stand for it.

    The checksums of what is read are checked just before: a whole file's, which may be larger than memory, would be read twice.
    """

    folder: Path
    masters: bool = True

    @cached_property
    def _checked(self) -> CheckedAhead:
        return CheckedAhead(self.folder.parent, opened(self.folder.parent))

    @cached_property
    def _reader(self) -> FileSystemReader:
        reader = FileSystemReader(self.folder)
        reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        return reader

    @cached_property
    def _metadata(self) -> Any:
        _ = self._checked  # the index is among what was seen to be sound as the checkpoint was opened
        return FileSystemReader(self.folder).read_metadata()

    def _stored(self, key: str) -> Any:
        found = self._metadata.state_dict_metadata.get(key)
        if found is None:
            raise UserError(f"{self.folder}: expected a tensor {key}, found none")
        return found

    def _place(self, name: str) -> tuple[str, Any, int | None]:
        """The key that gives parameter `name`, what is stored under it, and which layer of that."""
        key, layer = checkpoint_place(name)
        stored, held = self._stored(key), self._metadata.state_dict_metadata
        master = master_place(held, key, layer) if self.masters else None
        return (key, stored, layer) if master is None else (master[0], held[master[0]], master[1])

    def dtype(self, name: str) -> torch.dtype:
        """That it was saved in. Raises UserError if it is not there."""
        dtype: torch.dtype = self._place(name)[1].properties.dtype
        return dtype

    def read(self, name: str) -> Tensor:
        """In the dtype it was saved in. Raises UserError if it is not there."""
        key, stored, layer = self._place(name)
        whole = tuple(stored.size)
        offsets, sizes = [0] * len(whole), list(whole)
        if layer is not None:
            offsets[0], sizes[0] = layer, 1
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, stored, [chunk])
        if sum(math.prod(item.lengths) for item in items) != math.prod(sizes):
            raise UserError(f"{self.folder}: expected the whole of {name}, found a part of it or nothing")
        # What lies there in one piece is not copied once more, as the reader's own read_data would.
        found = self._piece(items[0]) if len(items) == 1 else self._joined(items, sizes, stored.properties.dtype)
        return found if layer is None else found[0]

    def _joined(self, items: Sequence[ReadItem], sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
        target = torch.empty(tuple(sizes), dtype=dtype)
        for item in items:
            target[_box(item.dest_offsets, item.lengths)] = self._piece(item)
        return target

    def _piece(self, item: ReadItem) -> Tensor:
        place = self._reader.storage_data[item.storage_index]
        name = f"{self.folder.name}/{place.relative_path}"
        self._checked.require(blocks_of_range(name, place.offset, place.length))
        with (self.folder / place.relative_path).open("rb") as file:
            part = self._reader._slice_file(file, place)
            stored: Tensor = torch.load(part, map_location="cpu", weights_only=True)
        return stored[_box(item.storage_offsets, item.lengths)]


def _box(offsets: Sequence[int], lengths: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(offset, offset + length) for offset, length in zip(offsets, lengths, strict=True))
