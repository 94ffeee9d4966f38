"""JPEGs decoded by DALI on this device against the torch backend: pixels and images a second."""

from __future__ import annotations

import time
from collections.abc import Iterator

from torch import Tensor

from pivot_megatron.data import dali, decoders
from pivot_megatron.data.decoders import Decoder
from pivot_megatron.data.images import ImageTransform
from pivot_megatron.data.views import Square
from pivot_megatron.errors import UserError
from pivot_megatron.runtime.device import available_cores, current_platform
from tests.gpu.rows import CannotRun, Row, held, told
from tests.jpegs import jpeg, photo

IMAGES = 256
SIDE = 384


def rows() -> Iterator[Row]:
    try:
        dali.require_dali()
    except UserError as error:
        raise CannotRun(str(error)) from None
    device = current_platform().device
    count = IMAGES if device.type == "cuda" else 8
    files = [jpeg(photo(640 + n % 7, 480 + n % 5)) for n in range(count)]
    values_0_to_1 = {"resample": 3, "rescale_factor": 1 / 255, "mean": None, "std": None}
    views = Square(ImageTransform(**values_0_to_1, image_size=SIDE), SIDE // 16)
    workers = available_cores()
    with decoders.opened(views, "torch", workers) as by_torch, dali.opened(views, workers, device) as by_dali:
        wanted, rate = _decoded(by_torch, files)
        found, dali_rate = _decoded(by_dali, files)
    far = [255 * (a - b).abs() for a, b in zip(found, wanted)]
    yield held("pixels: mean difference, of 255", float(sum(x.mean() for x in far) / count), 0.3)
    yield held("pixels: largest difference, of 255", float(max(x.max() for x in far)), 3.0)
    yield told(f"torch on {workers} cores, images a second", rate)
    yield told(f"DALI on {device}, images a second", dali_rate)


def _decoded(decode: Decoder, files: list[bytes]) -> tuple[list[Tensor], float]:
    decode(files[:8])
    began = time.perf_counter()
    pixels = decode(files)
    taken = time.perf_counter() - began
    return [one for one in pixels if isinstance(one, Tensor)], len(files) / taken
