"""Ranks read their own slices and no more."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pivot_megatron.convert.hf import HfTensors
from pivot_megatron.convert.load import hf_tensors_of, shard_of
from pivot_megatron.convert.plan import Slice, component_rows, parameter_shape
from pivot_megatron.families.table import FuseQKV, Row
from tests.parity import jobs
from tests.parity.reference import make_checkpoints


class Counting:
    """A folder's tensors, and which elements of them were given away."""

    def __init__(self, tensors: HfTensors) -> None:
        self._tensors = tensors
        self.where = tensors.where
        self.given: dict[str, Tensor] = {}

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors.dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors.shape(name)

    def read(self, name: str, part: Slice) -> Tensor:
        found = self._tensors.read(name, part)
        given = self.given.setdefault(name, torch.zeros(self.shape(name), dtype=torch.int64))
        own = given if part.dim is None else given.narrow(part.dim, part.start, part.stop - part.start)
        own += torch.ones_like(found, dtype=torch.int64)  # of another shape, where more was given than was asked for
        return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_checkpoints(tmp_path_factory.mktemp("hf"), tied=False)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("component", ["encoder", "llm"])
def test_each_rank_reads_only_its_slices(component: str, size: int, folders: tuple[Path, Path]) -> None:
    """One of `size` parts of every parameter that is split, zeros not counted, and between them all of it, once. A head has two
    key-value groups: four ranks share two slices of query, key and value, and read each of them twice."""
    arch = jobs.architecture(*folders)
    folder = folders[0 if component == "encoder" else 1]
    for row in component_rows(arch, component):
        sources = [Counting(hf_tensors_of(arch, component, folder)) for _ in range(size)]
        for rank, source in enumerate(sources):
            shard_of(row, source, rank, size)
        shared = size // slices(row, size)
        for part in row.hf:
            together = torch.stack([source.given[part] for source in sources])
            times = size if row.transform.tp_dim is None else shared
            assert together.max() == 1, part
            assert torch.all(together.sum(0) == times), part
        most = math.prod(parameter_shape(arch, f"{component}.{row.megatron}")) // slices(row, size)
        for source in sources:
            assert sum(int(given.sum()) for given in source.given.values()) <= most, row.megatron


def slices(row: Row, size: int) -> int:
    """Into how many a parameter is cut."""
    if row.transform.tp_dim is None:
        return 1
    return min(size, row.transform.groups) if isinstance(row.transform, FuseQKV) else size
