"""A step that is not finite moves nothing, bit for bit, says who is to blame, and the next one goes on as if it had not been."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from pivot_megatron.config.schema import Dpo
from tests import matrix
from tests.harness import Workers
from tests.parity import refused
from tests.parity.reference import make_checkpoints
from tests.parity.test_training import micro_batches, shares


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_checkpoints(tmp_path_factory.mktemp("hf"))


@matrix.layouts(matrix.SINGLE, matrix.DP2_OVERLAP, slow=(matrix.TP2, matrix.PP2, matrix.PP2_VPP2))
def test_it_moves_nothing_and_the_next_goes_on(layout, world, workers: Workers, checkpoints) -> None:
    key = micro_batches()[-1][0][0].key  # of the second data-parallel rank, where there are two
    arguments = (layout, world, *checkpoints, shares(layout, world), Dpo(beta=0.3))
    plain = workers.run(refused.steps, *arguments, (None, None))
    found = workers.run(refused.steps, *arguments, (None, key, "gradient", None))
    for rank, (one, wanted) in enumerate(zip(found, plain)):
        assert [result.applied for result in one["results"]] == [True, False, False, True]
        assert one["moved"][1] == one["moved"][2] == []
        assert one["moved"][0] and one["moved"][3]
        assert one["results"][3] == wanted["results"][1]
        assert all(torch.equal(one["state"][name], value) for name, value in wanted["state"].items())

        by_sample, by_gradient = one["results"][1], one["results"][2]
        assert by_sample.refused == "loss nan and gradient norm nan"
        assert math.isfinite(by_gradient.loss) and by_gradient.refused in ("gradient norm nan", "gradient norm inf")
        assert repr(one["blames"]) == repr(found[0]["blames"]), rank  # as text, for no NaN equals another
    blame = found[0]["blames"][1]
    (report,) = blame.samples
    assert report.worst.keys == (key,) and report.rank == (0 if world == 1 else world - 1 if layout.tensor == 1 else 0)
    assert blame.parameters == () and f"samples {key} of rank {report.rank} on " in blame.as_text()
    # What stands nearest to the loss has a gradient that is not finite, too; alone, only the one that was broken.
    assert blame.gradients[0].startswith("llm.") and BROKEN in blame.gradients
    assert found[0]["blames"][2].gradients == (BROKEN,)


BROKEN = refused.BROKEN_GRADIENT


@matrix.layouts(matrix.DP2, slow=(matrix.PP2,))
def test_nothing_that_is_not_finite_is_saved(layout, world, workers: Workers, checkpoints) -> None:
    for said in workers.run(refused.save_what_is_broken, layout, world, *checkpoints, BROKEN):
        assert f"found weights that are not finite: {BROKEN}; nothing is saved" in said


OVERFLOWS = {
    "encoder.decoder.layers.1.mlp.linear_fc1.weight": "encoder.decoder.layers.1.mlp.linear_fc1",
    "projector.encoder.linear_fc2.weight": "projector.encoder.linear_fc2",
    "llm.decoder.layers.1.mlp.linear_fc1.weight": "llm.decoder.layers.1.mlp.linear_fc1",
}


@pytest.mark.parametrize("weight", OVERFLOWS)
@matrix.layouts(matrix.DP2, slow=(matrix.TP2, matrix.PP2, matrix.PP2_VPP2))
def test_the_module_that_overflows_is_named(layout, world, weight: str, workers: Workers, checkpoints) -> None:
    found = workers.run(refused.overflow, layout, world, *checkpoints, shares(layout, world), weight)
    for ((modules, text),) in found:
        assert modules == (OVERFLOWS[weight],)
        assert f"numbers first not finite in the output of {OVERFLOWS[weight]}" in text


@matrix.layouts(matrix.TP2)
def test_a_module_that_overflows_on_one_rank_is_named(layout, world, workers: Workers, checkpoints) -> None:
    """What the others are given of it overflows in linear_proj, which stands before linear_qkv in their lists of modules."""
    weight = "encoder.decoder.layers.0.self_attention.linear_qkv.weight"
    for ((modules, _),) in workers.run(
        refused.overflow, layout, world, *checkpoints, shares(layout, world), weight, False
    ):
        assert modules == (weight.removesuffix(".weight"),)
