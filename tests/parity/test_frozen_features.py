"""What probes see of a frozen encoder, in its library's class, against what the trainer's own model makes of the same images."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pivot_megatron.convert.commands import import_checkpoint, whole_model
from pivot_megatron.convert.plan import COMPONENTS
from pivot_megatron.convert.store import describe, load_weights
from pivot_megatron.data.views import pixels_of
from pivot_megatron.probe.opening import opened
from tests.harness import Workers
from tests.parity.encoders import MAKERS, make
from tests.parity.images import Images, patches_of
from tests.parity.reference import make_checkpoints, relative_difference

TOLERANCE = 1e-5
SIZES = ((40, 30), (20, 50), (33, 33))


def trainers(checkpoint: Path, images: Images) -> tuple[Tensor, Tensor]:
    """A worker's job: patch features of all images, and what the language model sees of them."""
    with whole_model(describe(checkpoint)) as stage, torch.no_grad():
        for name in COMPONENTS:
            load_weights(stage, checkpoint, name)
        model, pixels = stage.whole, torch.cat(images.pixels)
        hidden = model.encoder(pixels, [grid for view in images.views for grid in view.grids])
        arch = model.arch.encoder
        return patches_of(hidden[: images.places(arch), 0], arch), model.image_features(pixels, images.views)[:, 0]


def pictures() -> list[tuple[str, bytes]]:
    draw, found = np.random.default_rng(0), []
    for width, height in SIZES:
        file = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (height, width, 3), np.uint8)).save(file, "PNG")
        found.append((f"{width}x{height}", file.getvalue()))
    return found


@pytest.mark.parametrize("family", MAKERS)
def test_features_are_the_trainers(family: str, workers: Workers, tmp_path: Path) -> None:
    folder, head = make(family, tmp_path / family), make_checkpoints(tmp_path / "head")[1]
    checkpoint = tmp_path / "checkpoint"
    import_checkpoint(folder, head, checkpoint, None, seed=5)
    with opened(folder) as frozen:
        found = frozen.patches(pictures())
        alone = [frozen.patches([one])[0] for one in pictures()]
        views = tuple(frozen.views.view(*size) for size in SIZES)
        images = Images([pixels_of(frozen.views, encoded, "pil") for _, encoded in pictures()], views)
    (result,) = workers.run(trainers, None, 1, checkpoint, images)
    expected, projected = result
    assert [len(patches) for patches in found] == [view.tokens for view in views]
    assert relative_difference(torch.cat(found), expected) <= TOLERANCE
    assert relative_difference(torch.cat(found), torch.cat(alone)) <= TOLERANCE  # whatever else is in the batch
    with opened(checkpoint) as frozen:
        assert relative_difference(torch.cat(frozen.patches(pictures())), expected) <= TOLERANCE
    with opened(checkpoint, projected=True) as frozen:
        seen = torch.cat(frozen.patches(pictures()))
    assert seen.shape[1] == frozen.width and relative_difference(seen, projected) <= TOLERANCE
