"""Decoding in threads: the same pixels as without, in order, and no thread left over."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from pivot_megatron.data import dali, decoders
from pivot_megatron.data.decoders import Decoded
from pivot_megatron.data.images import ImageError, ImageTransform, PixelSteps
from pivot_megatron.data.views import ImageViews, Native, Square, Tiled, pixels_of
from pivot_megatron.errors import UserError
from tests.jpegs import jpeg, photo, unusual

PLAIN = {"resample": 3, "rescale_factor": 1 / 255, "mean": None, "std": None}
SQUARE = ImageTransform(**PLAIN, image_size=48)
EVERY_VIEW: dict[str, ImageViews] = {
    "square": Square(SQUARE, 3),
    "tiles": Tiled(SQUARE, 3, ((1, 1), (1, 2), (2, 1), (2, 2)), 3),
    "patches": Native(PixelSteps(**PLAIN), 16, 24),
}


def files() -> list[bytes]:
    sound = [jpeg(photo(*size)) for size in ((60, 50), (31, 90), (200, 40), (48, 48), (1, 1))]
    return [*sound, b"", *unusual().values(), sound[0][:300], *sound]


def equal(found: Sequence[Decoded], expected: Sequence[Decoded]) -> bool:
    pairs = list(zip(found, expected, strict=True))
    assert all(isinstance(a, ImageError) == isinstance(b, ImageError) for a, b in pairs)
    return all(str(a) == str(b) if isinstance(a, ImageError) else torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("views", EVERY_VIEW.values(), ids=EVERY_VIEW)
@pytest.mark.parametrize("backend", ["pil", "torch"])
def test_any_number_of_threads_gives_the_same(views: ImageViews, backend: decoders.Backend) -> None:
    found: list[list[Decoded]] = []
    for workers in (0, 1, 4):
        with decoders.opened(views, backend, workers) as decode:
            found.append(decode(files()))
            assert decode([]) == []
    assert equal(found[1], found[0]) and equal(found[2], found[0])
    whole = [n for n, image in enumerate(found[0]) if not isinstance(image, ImageError)]
    assert len(whole) == len(files()) - 2
    assert all(torch.equal(found[0][n], pixels_of(views, files()[n], backend)) for n in whole)  # type: ignore[arg-type]


@pytest.mark.parametrize("fails", [False, True])
def test_threads_end_with_the_context(fails: bool) -> None:
    before = threading.active_count()
    try:
        with decoders.opened(EVERY_VIEW["square"], "torch", 3) as decode:
            decode(files())
            assert threading.active_count() > before
            if fails:
                raise RuntimeError("of whoever asked")
    except RuntimeError:
        assert fails
    assert threading.active_count() == before


def test_what_dali_decodes_at_once_is_bounded() -> None:
    many = dict.fromkeys(range(130), (10, 10))
    assert [len(batch) for batch in dali.batches(many)] == [64, 64, 2]
    large = {3: (8000, 8000), 5: (8000, 1000), 6: (1, 1), 8: (9000, 9000), 9: (9000, 9000)}
    assert list(dali.batches(large)) == [[3], [5, 6], [8], [9]]
    assert list(dali.batches({})) == []


def test_dali_that_is_missing_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError, match=r"data.image_backend: .* pip install 'pivot-megatron\[dali\]'"):
        dali.require_dali()
