"""Images of four colors, each in a corner of its own, with masks that say which."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

COLORS = np.array([(20, 30, 200), (10, 160, 40), (220, 20, 30), (230, 220, 40)], np.uint8)


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def corners(width: int, height: int, across: float, down: float, order: tuple[int, ...] = (0, 1, 2, 3)) -> np.ndarray:
    """A mask `[height, width]` of four corners that meet at those shares of its sides."""
    mask = np.empty((height, width), np.uint8)
    x, y = round(across * width), round(down * height)
    mask[:y, :x], mask[:y, x:], mask[y:, :x], mask[y:, x:] = order
    return mask


def pairs(count: int, seed: int, planted: bool = True, middle: bool = False) -> list[tuple[bytes, bytes]]:
    """(image, mask); where not `planted`, images are noise. `middle`: corners meet there, so that a patch of an even number of
    them to a side has one color; else anywhere."""
    draw, found = np.random.default_rng(seed), []
    for _ in range(count):
        width, height = (2 * draw.integers(15, 30, 2)).tolist()
        meet = (0.5, 0.5) if middle else draw.uniform(0.3, 0.7, 2)
        mask = corners(width, height, *meet, tuple(draw.permutation(4)))
        noise = draw.normal(0, 8, (height, width, 3))
        image = (COLORS[mask] if planted else draw.uniform(0, 255, (height, width, 3))) + noise
        found.append((png(image.clip(0, 255).astype(np.uint8)), png(mask)))
    return found


def write_folder(root: Path, split: str, some: list[tuple[bytes, bytes]]) -> Path:
    """As the SceneParse150 release lies: `root/images/split` with `root/annotations/split`. Returns the former."""
    for n, contents in enumerate(some):
        for kind, content in zip(("images", "annotations"), contents):
            path = root / kind / split / "deep" / f"{n:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return root / "images" / split


def write_parquet(path: Path, some: list[tuple[bytes, bytes]], group: int, mask_column: str = "annotation") -> Path:
    """As the datasets library writes images, `group` rows in a row group."""
    columns = {
        name: [{"bytes": pair[n], "path": None} for pair in some] for n, name in enumerate(("image", mask_column))
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({**columns, "scene_category": list(range(len(some)))}), path, row_group_size=group)
    return path
