"""Ordered patterns: what is frozen keeps every bit, and a factor scales a parameter's step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pivot_megatron.config.schema import Dpo, ParameterRule
from pivot_megatron.errors import UserError
from pivot_megatron.model.freeze import rate_of, require_matches
from tests import matrix
from tests.harness import Workers
from tests.parity import training_jobs
from tests.parity.reference import make_checkpoints
from tests.parity.test_conversion import stored
from tests.parity.test_training import shares

FROZEN = ParameterRule("encoder.*", "frozen")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_checkpoints(tmp_path_factory.mktemp("hf"))


@matrix.layouts(matrix.SINGLE, matrix.TP2, matrix.PP2, matrix.DP2)
def test_frozen_stays_and_factors_scale(layout, world, workers: Workers, checkpoints) -> None:
    def weights(*rules: ParameterRule) -> dict[str, torch.Tensor]:
        batches = shares(layout, world)
        return workers.run(training_jobs.train_steps, layout, world, *checkpoints, batches, Dpo(beta=0.3), 1, rules)[0][
            "weights"
        ]

    start = stored(*checkpoints)
    full = weights(FROZEN)
    slow = weights(FROZEN, ParameterRule("llm.decoder.layers.1.*", 0.25))
    for name, tensor in start.items():
        if name.startswith("vision_model."):
            assert torch.equal(full[name], tensor), name
        elif not name.startswith("model.layers.1."):
            assert torch.equal(full[name], slow[name]), name
        else:  # Adam's first step is linear in the learning rate; rounding of the weights leaves a little
            moved, expected = slow[name] - tensor, 0.25 * (full[name] - tensor)
            assert torch.allclose(moved, expected, rtol=1e-3, atol=3e-7), name
            assert full[name].ne(tensor).any(), name


def test_first_match_holds() -> None:
    rules = (ParameterRule("encoder.patch*", 0.5), ParameterRule("encoder.*", "frozen"), ParameterRule("*", 2.0))
    names = ("encoder.patch_embedding.weight", "encoder.position_embedding.weight", "llm.x")
    assert [rate_of(name, rules) for name in names] == [0.5, "frozen", 2.0]
    assert rate_of("llm.x", ()) == 1.0


def test_patterns_that_match_nothing_are_errors() -> None:
    with pytest.raises(UserError, match=r"parameters.0.match: no parameter is named like 'vision.\*'"):
        require_matches(["encoder.x", "llm.y"], (ParameterRule("vision.*", "frozen"),))
    with pytest.raises(UserError, match="nothing to train"):
        require_matches(["encoder.x"], (ParameterRule("*", "frozen"),))
