"""Images with a mask each: folders as ADE20K's SceneParse150 release has them, or parquet as Hugging Face has it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pivot_megatron.errors import UserError
from pivot_megatron.probe.masked_parquet import ParquetRows
from pivot_megatron.probe.stored import EXTENSIONS, files_at, image_file

IMAGES, MASKS = "images", "annotations"


@dataclass(frozen=True)
class MaskedImages:
    """`names`, `mask_names`: for errors. `read`, `read_mask`: an image's and its mask's encoded bytes; cheap in order.
    `fingerprint`: equal for equal images and masks in the same order."""

    names: tuple[str, ...]
    mask_names: tuple[str, ...]
    read: Callable[[int], bytes]
    read_mask: Callable[[int], bytes]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def opened(cls, where: Path) -> MaskedImages:
        """One of:

        - a folder that holds `images/**/NAME.jpg` (or another image) and `annotations/**/NAME.png`;
        - a folder within such an `images`, as `ADEChallengeData2016/images/training`, whose masks are those of the folder of the
          same name within `annotations`;
        - parquet files with an image and a mask in each row: a file, those of a folder, or of a pattern.

        Raises UserError where it is none of them, for an image without a mask, and for a mask without an image.
        """
        if not where.is_dir() or any(where.glob("*.parquet")):
            return _of_parquet(files_at(where, "parquet", "parquet file"))
        return _of_folders(where, *_folders(where))


def _folders(where: Path) -> tuple[Path, Path]:
    if (where / IMAGES).is_dir():
        return where / IMAGES, where / MASKS
    parts = where.parts
    if IMAGES not in parts:
        raise UserError(
            f"{where}: expected folders {IMAGES} and {MASKS} in it, or that it lies within such a folder {IMAGES}, or parquet "
            "files, found none of them"
        )
    at = len(parts) - 1 - parts[::-1].index(IMAGES)
    return where, Path(*parts[:at], MASKS, *parts[at + 1 :])


def _of_folders(where: Path, folder: Path, mask_folder: Path) -> MaskedImages:
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in EXTENSIONS]
    if not paths:
        raise UserError(f"{where}: expected images, found none")
    if full := next((path for path in paths if path.stem.endswith("_seg")), None):
        raise UserError(
            f"{full}: this is the full ADE20K release, whose thousands of classes are not the 150 of its benchmark; give the "
            "SceneParse150 release (ADEChallengeData2016)"
        )
    mask_paths = [mask_folder / path.relative_to(folder).with_suffix(".png") for path in paths]
    owners: dict[Path, Path] = {}
    for path, mask_path in zip(paths, mask_paths, strict=True):
        if not mask_path.is_file():
            raise UserError(f"{path}: expected its mask at {mask_path}, found none")
        if mask_path in owners:
            raise UserError(
                f"{mask_path}: expected one image that it is the mask of, found {owners[mask_path]} and {path}"
            )
        owners[mask_path] = path
    if odd := next((path for path in sorted(mask_folder.rglob("*.png")) if path not in owners), None):
        raise UserError(
            f"{odd}: expected an image of the same name in {folder}, found none; remove the mask, or fetch it"
        )
    images, masks = ([image_file(path, "") for path in some] for some in (paths, mask_paths))
    return MaskedImages(
        tuple(image.name for image in images),
        tuple(mask.name for mask in masks),
        lambda n: images[n].read(),
        lambda n: masks[n].read(),
        _digest([one.facts for one in (*images, *masks)]),
    )


def _of_parquet(files: Sequence[Path]) -> MaskedImages:
    rows = ParquetRows.opened(files)
    names = [rows.name(n) for n in range(len(rows))]
    return MaskedImages(
        tuple(names),
        tuple(f"{name}: {rows.mask_column}" for name in names),
        lambda n: rows.read(n, "image"),
        lambda n: rows.read(n, rows.mask_column),
        _digest([rows.mask_column, *(image_file(path, "").facts for path in files)]),
    )


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
