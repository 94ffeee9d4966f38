"""Position embeddings of an encoder at another resolution than its checkpoint's."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pivot_megatron.convert.hf import HfTensors
from pivot_megatron.convert.plan import Slice


def resized(positions: Tensor, extra: int, grid: int) -> Tensor:
    """`[..., extra + old * old, H]` to `[..., extra + grid * grid, H]` as transformers' `interpolate_pos_encoding` has it:
    bicubic, corners not aligned, in float32. The first `extra`, of class tokens, stay."""
    rest = positions.shape[:-2]
    first, patches = positions.reshape(-1, positions.shape[-1]).split([extra, positions.shape[-2] - extra])
    old = math.isqrt(patches.shape[0])
    image = patches.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    image = interpolate(image.float(), size=(grid, grid), mode="bicubic", align_corners=False).to(positions.dtype)
    patches = image.permute(0, 2, 3, 1).reshape(grid * grid, -1)
    return torch.cat([first, patches]).reshape(*rest, -1, positions.shape[-1])


@dataclass(frozen=True)
class ResizedPositions:
    """`tensors` with the one called `name` resized to `grid` patches a side, `extra` positions before them."""

    tensors: HfTensors
    name: str
    extra: int
    grid: int

    @property
    def where(self) -> str:
        return self.tensors.where

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors.dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self.tensors.shape(name)
        return (*shape[:-2], self.extra + self.grid**2, shape[-1]) if name == self.name else shape

    def read(self, name: str, part: Slice | None = None) -> Tensor:
        found = self.tensors.read(name, part)
        return resized(found, self.extra, self.grid) if name == self.name else found
