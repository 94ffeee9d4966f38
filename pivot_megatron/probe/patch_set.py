"""Features and classes of the patches of many images, in files that are read from as they are used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pivot_megatron.data.views import Grid
from pivot_megatron.runtime.device import current_platform

IMAGES_A_FILE = 256  # so many are in memory at once, and lost at most by an interrupted pass

Packed = npt.NDArray[np.uint8]
Half = npt.NDArray[np.float16]


@dataclass(frozen=True)
class PatchSet:
    """Of images in order, `IMAGES_A_FILE` a file: `features` `[patches, width]`; `targets` `[patches, ceil(classes / 8)]`, bits
    in numpy's order that say which classes are there. `grids`: of each image, its patches down and across, which follow
    each other row by row. `covered`: the share of its height and width that they cover, from its top left corner on.
    `fingerprint`: equal for equal features and targets."""

    features: tuple[Half, ...]
    targets: tuple[Packed, ...]
    grids: tuple[Grid, ...]
    covered: tuple[tuple[float, float], ...]
    classes: int
    fingerprint: str

    def __len__(self) -> int:
        return len(self.grids)

    @property
    def width(self) -> int:
        return int(self.features[0].shape[1])

    def of(self, images: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Patches of these images, one image after the other, on the device: features `[patches, width]` float32, and whether
        each class is there `[patches, classes]` bool."""
        places = [self._place(n) for n in images]
        features = np.concatenate([self.features[file][rows] for file, rows in places])
        targets = np.concatenate([self.targets[file][rows] for file, rows in places])
        there = np.unpackbits(targets, axis=1, count=self.classes).view(np.bool_)
        device = current_platform().device
        return torch.from_numpy(features).to(device).float(), torch.from_numpy(there).to(device)

    @property
    def present(self) -> npt.NDArray[np.intp]:
        """Indices of the classes that are there at least once."""
        bits = np.stack([np.bitwise_or.reduce(targets, axis=0) for targets in self.targets])
        return np.flatnonzero(np.unpackbits(np.bitwise_or.reduce(bits, axis=0), count=self.classes))

    @cached_property
    def _starts(self) -> npt.NDArray[np.int64]:
        return np.cumsum([0, *(math.prod(grid) for grid in self.grids)])

    def _place(self, image: int) -> tuple[int, slice]:
        """Its file, and its rows there."""
        file = image // IMAGES_A_FILE
        first = self._starts[file * IMAGES_A_FILE]
        return file, slice(int(self._starts[image] - first), int(self._starts[image + 1] - first))
