"""Files in the layouts that data sets are published in, made on the spot."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pivot_megatron.data.shards import open_shards


def picture(
    seed: int = 0, kind: str = "JPEG", size: tuple[int, int] = (20, 12), mode: str = "RGB", **options: Any
) -> bytes:
    """A small image of smooth colors, different for each seed."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    levels = np.stack([x * 200 // width, y * 200 // height, np.full_like(x, seed % 256)], axis=2).astype(np.uint8)
    return encoded(Image.fromarray(levels).convert(mode), kind, **options)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def write_images(folder: Path, images: Mapping[str, bytes]) -> Path:
    for name, data in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def llava_row(number: int, image: Any = None, **more: Any) -> dict[str, Any]:
    mark = "" if image is None else "<image>\n"
    turns = [{"from": "human", "value": f"{mark}What is {number}?"}, {"from": "gpt", "value": f"It is {number}."}]
    return {"id": f"id.{number}", **({} if image is None else {"image": image}), "conversations": turns, **more}


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def report(folder: Path) -> Any:
    return json.loads((folder / "report.json").read_text())


def samples(folder: Path) -> list[Any]:
    reader = open_shards(folder)
    return [reader.read(position) for position in range(len(reader))]
