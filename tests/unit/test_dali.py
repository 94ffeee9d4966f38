"""DALI against the torch backend: the same samples, the same order, the same pixels; needs the `dali` extra."""

from __future__ import annotations

import sys
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from pivot_megatron.data import dali, decoders
from pivot_megatron.data.decoders import Decoded
from pivot_megatron.data.images import ImageError, ImageTransform
from pivot_megatron.data.views import ImageViews, Square
from pivot_megatron.errors import UserError
from pivot_megatron.runtime.device import current_platform
from tests.jpegs import SIZES, broken, gradient, jpeg, photo, plain, text, unusual
from tests.unit.test_decoders import EVERY_VIEW, PLAIN

needs_dali = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="DALI is for Linux"),
]
pytestmark = needs_dali


def both(views: ImageViews, files: list[bytes], workers: int = 2) -> tuple[list[Decoded], list[Decoded]]:
    """By torch, and by DALI."""
    with (
        decoders.opened(views, "torch", 0) as by_torch,
        dali.opened(views, workers, current_platform().device) as by_dali,
    ):
        return by_torch(files), by_dali(files)


def assert_close(found: Tensor, expected: Tensor, what: object) -> None:
    """Pixels between 0 and 1. On a CPU both decode by libjpeg-turbo and resize by torch; a GPU rounds otherwise."""
    assert found.shape == expected.shape and found.dtype == expected.dtype == torch.float32, what
    if not current_platform().is_cuda:
        assert torch.equal(found, expected), what
    difference = (found - expected).abs() * 255
    assert difference.numel() == 0 or (difference.max() <= 3 and difference.mean() <= 0.3), what


def assert_alike(views: ImageViews, files: dict[str, bytes], workers: int = 2) -> None:
    """The same images are refused, in the same words, and the others have the same pixels."""
    for name, by_torch, by_dali in zip(files, *both(views, list(files.values()), workers), strict=True):
        if isinstance(by_torch, ImageError) or isinstance(by_dali, ImageError):
            assert str(by_torch) == str(by_dali), name
        else:
            assert_close(by_dali, by_torch, name)


@pytest.mark.parametrize("views", EVERY_VIEW.values(), ids=EVERY_VIEW)
def test_pixels_are_those_of_the_torch_backend(views: ImageViews) -> None:
    files = plain()
    assert all(dali.Plain.of(file) for file in files.values())
    assert_alike(views, files)


@pytest.mark.parametrize("resample", [2, 3])
def test_both_filters_and_a_real_size(resample: int) -> None:
    files = {f"{kind.__name__} {size}": jpeg(kind(*size)) for kind in (photo, text, gradient) for size in SIZES[:5]}
    assert_alike(Square(ImageTransform(**PLAIN | {"resample": resample}, image_size=384), 24), files)


def test_other_images_are_left_to_the_torch_backend() -> None:
    files = unusual()
    others = {name for name, file in files.items() if dali.Plain.of(file) is None}
    assert others == files.keys() - {"behind the end", "an end in the middle"}
    for views in EVERY_VIEW.values():
        assert_alike(views, files)


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_both_refuse_the_same_images(workers: int) -> None:
    """And where neither does, both see the same, whatever else stands in the batch."""
    files = {str(n): file for n, file in enumerate(broken(12, seed=workers))}
    by_torch, _ = both(EVERY_VIEW["square"], [])
    with decoders.opened(EVERY_VIEW["square"], "torch", 0) as decode:
        refused = sum(isinstance(one, ImageError) for one in decode(list(files.values())))
    assert 100 < refused < len(files) - 100 and not by_torch
    assert_alike(EVERY_VIEW["square"], files, workers)


def test_dali_goes_on_after_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = jpeg(photo(60, 50))
    table = sound.index(b"\xff\xc4")
    refused = sound[: table + 5] + b"\xff" * 16 + sound[table + 21 :]
    assert dali.Plain.of(refused) is not None
    started = 0

    def counted(threads: int, device: torch.device, real: object = dali._started) -> object:
        nonlocal started
        started += 1
        return real(threads, device)  # type: ignore[operator]

    monkeypatch.setattr(dali, "_started", counted)
    _, found = both(EVERY_VIEW["square"], [sound, refused, sound, sound])
    assert [isinstance(one, ImageError) for one in found] == [False, True, False, False]
    assert started == 3  # for the batch, for each image of it, and after the one that was refused


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_unopened(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = jpeg(photo(60, 50))
    frame = whole.index(b"\xff\xc0")
    for edge in (10_000, 60_000):
        lying = whole[: frame + 5] + edge.to_bytes(2) * 2 + whole[frame + 9 :]
        monkeypatch.setattr(dali.DaliDecoder, "_decoded", None)
        by_torch, by_dali = both(EVERY_VIEW["square"], [lying])
        assert isinstance(by_dali[0], ImageError) and str(by_dali[0]) == str(by_torch[0])
        assert "pixels" in str(by_dali[0])


def test_dali_that_does_not_work_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali, "beside_training", lambda device: nullcontext)
    with (
        pytest.raises(UserError, match="DALI does not decode here") as caught,
        dali.opened(EVERY_VIEW["square"], 1, torch.device("cuda", 77)) as decode,
    ):
        decode([jpeg(photo(60, 50))])
    assert "\n" not in str(caught.value)
