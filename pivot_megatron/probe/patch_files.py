"""What is kept of the patches of many images: their features and classes, made where they are not there yet."""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pivot_megatron.data.images import ImageError, decode_mask, image_size_of
from pivot_megatron.data.views import Grid
from pivot_megatron.errors import UserError
from pivot_megatron.probe.encoder import FrozenEncoder
from pivot_megatron.probe.features import Say, batches, silent
from pivot_megatron.probe.kept import kept, kept_file
from pivot_megatron.probe.masked import MaskedImages
from pivot_megatron.probe.patch_classes import Mask, patch_classes
from pivot_megatron.probe.patch_set import IMAGES_A_FILE, Half, Packed, PatchSet

Sizes = npt.NDArray[np.int64]
_DTYPE = np.float16
_GIB = 1 << 30


@dataclass(frozen=True)
class PatchWork:
    """What is to be known of `images` as `encoder` cuts them; `sizes` `[images, 2]`: width and height. `classes`: of masks."""

    encoder: FrozenEncoder
    images: MaskedImages
    sizes: Sizes
    classes: int
    cache: Path | None

    @cached_property
    def grids(self) -> tuple[Grid, ...]:
        return tuple(self.encoder.views.view(width, height).grids[0] for width, height in self.sizes.tolist())

    @property
    def covered(self) -> tuple[tuple[float, float], ...]:
        patch = self.encoder.arch.patch_size
        return tuple(
            (rows * patch / down, columns * patch / across)
            for (rows, columns), (down, across) in zip(self.grids, self.resized, strict=True)
        )

    @cached_property
    def resized(self) -> tuple[Grid, ...]:
        """To how many pixels down and across each image is brought."""
        return tuple(self.encoder.views.sizes(width, height)[0] for width, height in self.sizes.tolist())

    @property
    def parts(self) -> list[range]:
        """Images of each file."""
        return [range(len(self.images))[n : n + IMAGES_A_FILE] for n in range(0, len(self.images), IMAGES_A_FILE)]

    @property
    def fingerprint(self) -> str:
        return f"{self.encoder.fingerprint} {self.images.fingerprint} {self.classes}"

    @property
    def missing_bytes(self) -> int:
        """What features take on the disk that are not there yet, but for the heads of files."""
        if self.cache is None:
            return 0
        missing = (part for part in self.parts if not kept_file(self.cache, self._told("features", part)).is_file())
        return sum(self._patches(part) for part in missing) * self.encoder.width * np.dtype(_DTYPE).itemsize

    def targets(self, say: Say = silent) -> tuple[Packed, ...]:
        """As PatchSet has them. Raises UserError naming a mask that cannot be read, or with a class that is none."""
        found = []
        for part in self.parts:
            told = f"{self._told('targets', part)} {self.classes}"
            found.append(kept(partial(self._targets, part), self.cache, told, mapped=True))
            say(f"{part.stop} of {len(self.images)} masks")
        return tuple(found)

    def features(self, batch: int, say: Say = silent) -> tuple[Half, ...]:
        """As PatchSet has them; `batch` images pass the encoder at once. Raises UserError naming an image that does not decode,
        or whose features float16 does not hold."""
        return tuple(
            kept(partial(self._features, part, batch, say), self.cache, self._told("features", part), mapped=True)
            for part in self.parts
        )

    def _told(self, what: str, part: range) -> str:
        encoder = self.encoder
        seen = encoder.fingerprint if what == "features" else f"{encoder.views.fingerprint} {encoder.arch.patch_size}"
        return f"patch {what} {seen} {self.images.fingerprint} {part}"

    def _patches(self, part: range) -> int:
        return sum(math.prod(self.grids[n]) for n in part)

    def _targets(self, part: range) -> Packed:
        with ThreadPoolExecutor() as pool:
            return np.concatenate(list(pool.map(self._image_targets, part, map(self.images.read_mask, part))))

    def _image_targets(self, image: int, encoded: bytes) -> Packed:
        mask = self._mask(image, encoded)
        if (highest := int(mask.max())) >= self.classes:
            raise UserError(
                f"{self.images.mask_names[image]}: expected classes 0 to {self.classes - 1}, found {highest}; set --classes, or "
                "give what has no class one of its own"
            )
        found = patch_classes(mask, self.resized[image], self.encoder.arch.patch_size, self.classes)
        return np.packbits(found.reshape(-1, self.classes), axis=1)

    def _mask(self, image: int, encoded: bytes) -> Mask:
        try:
            return decode_mask(encoded)
        except ImageError as error:
            raise UserError(f"{self.images.mask_names[image]}: not a mask that can be read ({error.detail})") from None

    def _features(self, part: range, batch: int, say: Say) -> Half:
        found, at = np.empty((self._patches(part), self.encoder.width), _DTYPE), 0
        for some in batches(self.images, part, batch, part.start, len(self.images), say):
            for (name, _), patches in zip(some, self.encoder.patches(some), strict=True):
                half = patches.half()
                if not half.isfinite().all():
                    raise UserError(
                        f"{name}: expected features that float16 holds, found {float(patches.abs().max()):g}; set --feature-layer"
                    )
                found[at : at + len(half)] = half.cpu().numpy()
                at += len(half)
        return found


def image_sizes(images: MaskedImages, cache: Path | None = None) -> Sizes:
    """Width and height `[images, 2]`. Raises UserError naming what cannot be read, and a mask of another size than its image."""

    def work() -> Sizes:
        found = []
        for n, (name, mask_name) in enumerate(zip(images.names, images.mask_names, strict=True)):
            size = _size(name, "an image", images.read(n))
            if (other := _size(mask_name, "a mask", images.read_mask(n))) != size:
                raise UserError(
                    f"{mask_name}: expected {size[0]}x{size[1]} pixels, as {name} has, found {other[0]}x{other[1]}"
                )
            found.append(size)
        return np.array(found, np.int64)

    return kept(work, cache, f"sizes {images.fingerprint}")


def _size(name: str, kind: str, encoded: bytes) -> tuple[int, int]:
    try:
        return image_size_of(io.BytesIO(encoded))
    except ImageError as error:
        raise UserError(f"{name}: not {kind} that can be read ({error.detail})") from None


def patch_sets(
    encoder: FrozenEncoder,
    sets: Sequence[tuple[str, MaskedImages]],
    classes: int,
    batch: int = 64,
    cache: Path | None = None,
    say: Say = silent,
) -> list[PatchSet]:
    """Of each of (name, images). All masks are read, and the disk is looked at, before the first image passes the encoder. Raises
    UserError for images and masks that do not go together, and a disk without room."""
    works = [PatchWork(encoder, images, image_sizes(images, cache), classes, cache) for _, images in sets]
    targets = [work.targets(partial(_said, say, name)) for work, (name, _) in zip(works, sets, strict=True)]
    if cache is not None and (need := sum(work.missing_bytes for work in works)):
        say(f"features of patches take {need / _GIB:.2f} GiB in {cache}")
        cache.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(cache).free) < need:
            raise UserError(
                f"{cache}: features of patches take {need / _GIB:.2f} GiB, and {free / _GIB:.2f} are free; set --out to another "
                "disk"
            )
    return [
        PatchSet(
            work.features(batch, partial(_said, say, name)), theirs, work.grids, work.covered, classes, work.fingerprint
        )
        for work, theirs, (name, _) in zip(works, targets, sets, strict=True)
    ]


def _said(say: Say, name: str, told: str) -> None:
    say(f"{name}, {told}")
