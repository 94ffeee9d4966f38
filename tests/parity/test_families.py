"""Every encoder family against its own library: each layer, the features, gradients, a DPO step, and the way back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pivot_megatron.config.schema import Dpo
from pivot_megatron.convert.plan import component_rows
from pivot_megatron.families.table import Row
from pivot_megatron.model.composition import Architecture
from tests import matrix
from tests.harness import Workers
from tests.parity import jobs, training_jobs
from tests.parity.encoders import MAKERS, Library, make
from tests.parity.images import make_images
from tests.parity.reference import make_checkpoints, make_pairs, relative_difference

TOLERANCE = 1e-5
GRADIENTS = 1e-4
LAYOUTS = (matrix.SINGLE, matrix.TP2, matrix.PP2, matrix.TP2_PP2)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoints(tmp_path_factory.mktemp("head"))[1]


@pytest.fixture(scope="module", params=list(MAKERS))
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(request.param, tmp_path_factory.mktemp("encoder") / request.param)


@matrix.layouts(*LAYOUTS, slow=(matrix.TP4, matrix.TP4_PP2))
def test_each_layer_and_the_features(layout, world, workers: Workers, encoder: Path, head: Path) -> None:
    arch = jobs.architecture(encoder, head)
    library = Library(arch, encoder)
    images = make_images(arch.encoder, 2, seed=8)
    with torch.no_grad():
        layers, _ = library.layers(images)
        features = library.features(images)
    seen = [r for r in workers.run(jobs.encoder_pass, layout, world, encoder, head, images, None) if r]
    assert len(seen) == layout.tensor
    for found in seen:
        assert len(found["layers"]) == arch.encoder_layers
        for i, hidden in enumerate(found["layers"]):
            assert relative_difference(hidden, layers[i]) <= TOLERANCE, i
        assert relative_difference(found["features"], features) <= TOLERANCE


@matrix.layouts(matrix.SINGLE, matrix.TP2, slow=(matrix.PP2, matrix.TP2_PP2, matrix.TP4, matrix.TP4_PP2))
def test_gradients_and_the_round_trip(layout, world, workers: Workers, encoder: Path, head: Path) -> None:
    arch = jobs.architecture(encoder, head)
    library = Library(arch, encoder)
    images = make_images(arch.encoder, 2, seed=8)
    tokens = sum(view.tokens for view in images.views)
    towards = torch.randn(tokens, arch.encoder.hidden, generator=torch.Generator().manual_seed(9))
    (library.features(images) * towards).sum().backward()
    stored = {n: p.detach() for n, p in library.model.named_parameters()}
    wanted = {n: p.grad for n, p in library.model.named_parameters() if p.grad is not None}
    largest = max(float(g.abs().max()) for g in wanted.values())
    for found in workers.run(jobs.encoder_pass, layout, world, encoder, head, images, towards):
        for row in component_rows(arch, "encoder"):
            for part in row.hf:
                assert torch.equal(found["weights"][part], library.named(stored, part)), part
                if not is_constant(row, arch):
                    expected = library.named(wanted, part)
                    difference = float((found["gradients"][part] - expected).abs().max())
                    assert difference <= GRADIENTS * max(float(expected.abs().max()), 1e-3 * largest), part


@matrix.layouts(matrix.SINGLE, matrix.TP2_PP2)
def test_a_dpo_step(layout, world, workers: Workers, encoder: Path, head: Path) -> None:
    """Fixed positions stay where they are, all else moves; every rank agrees on the loss, which begins at log 2."""
    arch = jobs.architecture(encoder, head)
    images = make_images(arch.encoder, 2, seed=4)
    pairs = make_pairs(2, seed=3, vocabulary=200, views=images.views)
    shares: training_jobs.Shares = [[(pairs, images.pixels)]]
    results = workers.run(training_jobs.train_steps, layout, world, encoder, head, shares, Dpo(beta=0.3), 1)
    library = Library(arch, encoder)
    stored = {n: p.detach() for n, p in library.model.named_parameters()}
    for found in results:
        assert found["results"][0].loss == pytest.approx(0.6931, abs=1e-4)
        for row in component_rows(arch, "encoder"):
            for n, part in enumerate(row.hf):
                if n == 1 and row.megatron.endswith("linear_qkv.bias"):
                    continue  # a key's bias adds the same to every score: its true gradient is zero
                same = torch.equal(found["weights"][part], library.named(stored, part))
                assert same == is_constant(row, arch), part


def is_constant(row: Row, arch: Architecture) -> bool:
    return arch.encoder.fixed_positions and row.megatron == "position_embedding.weight"
