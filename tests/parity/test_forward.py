"""Forward parity with transformers, fp32, at every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import matrix
from tests.harness import Workers
from tests.parity import jobs
from tests.parity.reference import (
    Reference,
    images_of,
    make_checkpoints,
    make_pairs,
    make_pixels,
    relative_difference,
)

TOLERANCE = 1e-5  # fp32 sums in another order over a few hundred terms: measured differences are below 3e-6


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def checkpoints(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_checkpoints(tmp_path_factory.mktemp("hf"), tied=request.param)


def projector_parts(encoder: Path, head: Path) -> dict[str, torch.Tensor]:
    from pivot_megatron.convert.load import FreshParts
    from pivot_megatron.convert.plan import Slice

    arch = jobs.architecture(encoder, head)
    wide, width = arch.encoder.hidden, arch.head.hidden
    shapes = {
        "multi_modal_projector.linear_1.weight": (width, wide),
        "multi_modal_projector.linear_1.bias": (width,),
        "multi_modal_projector.linear_2.weight": (width, width),
        "multi_modal_projector.linear_2.bias": (width,),
    }
    fresh = FreshParts(shapes, seed=5)
    return {name: fresh.read(name, Slice()) for name in shapes}


@matrix.layouts(*matrix.FORWARD)
def test_forward_equals_transformers(layout, world, workers: Workers, checkpoints: tuple[Path, Path]) -> None:
    encoder, head = checkpoints
    samples = make_pairs(4, seed=7, vocabulary=200, text_only=(2,))
    pixels = make_pixels(3, seed=8)
    reference = Reference(encoder, head, projector_parts(encoder, head)).eval()
    with torch.no_grad():
        states = reference.hidden_states(pixels)
        images = images_of(samples, pixels)
        logprobs = torch.cat([x for s, i in zip(samples, images) for x in reference.branch_logprobs(s, i)])
        logits = torch.cat([reference.branch_logits(s, b, i) for s, i in zip(samples, images) for b in range(2)])

    results = workers.run(jobs.forward, layout, world, encoder, head, samples, pixels)

    layers = [r for r in results if "encoder.0" in r]
    assert len(layers) == layout.tensor
    for seen in layers:
        for i in range(3):  # feature layer -2: three of the four layers are built
            found = seen[f"encoder.{i}"].view(-1, 96)[: 3 * 16].view(3, 16, 96)
            assert relative_difference(found, states[i + 1]) <= TOLERANCE
        assert "encoder.3" not in seen
    answers = [r for r in results if "logprobs" in r]
    assert len(answers) == layout.tensor
    for seen in answers:
        assert relative_difference(seen["logprobs"], logprobs) <= TOLERANCE
        assert relative_difference(seen["logits"], logits) <= TOLERANCE
