"""Pairs over photograph-like JPEG files, as large and as hard to decode as a camera's at the same size."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from pivot_megatron.data.shard_writer import ShardWriter

SIZES = ((640, 480), (480, 640), (800, 600), (1024, 683))
"""Width and height, in turn."""
QUALITY = 90
ANSWER = " ".join(["word"] * 60)

_OCTAVES = 8  # each twice as fine as the one before and with two thirds of its contrast
_SAMPLES_A_SHARD = 1000


def write_photos(folder: Path, count: int, seed: int) -> None:
    """`count` pairs in shards at `folder`."""
    with ShardWriter(folder, _SAMPLES_A_SHARD) as writer:
        for number in range(count):
            record = {"question": "what is shown", "chosen": ANSWER, "rejected": f"{ANSWER} not"}
            writer.write(f"{number:06d}", photo(*SIZES[number % len(SIZES)], seed + number), "jpg", record)


def photo(width: int, height: int, seed: int) -> bytes:
    """Noise of every scale, the coarse the stronger, as natural images have it."""
    random = np.random.default_rng(seed)
    image = np.zeros((height, width, 3))
    for octave in range(_OCTAVES):
        cells = random.integers(0, 256, (3 << octave, 4 << octave, 3), dtype=np.uint8)
        layer = Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)
        image += (2 / 3) ** octave * (np.asarray(layer, np.float64) - 127.5)
    file = io.BytesIO()
    Image.fromarray(np.clip(image / 1.5 + 127.5, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()
