"""Gradients and updated weights against a plain single-process implementation, at every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pivot_megatron.config.schema import Dpo, Layout, ParameterRule, Recompute, Sft
from pivot_megatron.data.tokens import Tokenized
from tests import matrix
from tests.harness import Workers
from tests.parity import training_jobs
from tests.parity.reference import Reference, images_of, make_checkpoints, make_pairs, make_pixels
from tests.parity.test_forward import projector_parts

STEPS = 2
# fp32 throughout; measured: gradients within 2e-5 of the largest entry of their tensor, weights within 2e-6.
TOLERANCE = 1e-4
MICRO_BATCHES = ((0, 3), (3, 4), (4, 6))  # uneven; the last two pairs have no image


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_checkpoints(tmp_path_factory.mktemp("hf"))


def the_pairs() -> tuple[list[Tokenized], Tensor]:
    return make_pairs(6, seed=11, vocabulary=200, text_only=(4, 5)), make_pixels(4, seed=12)


def micro_batches() -> list[tuple[list[Tokenized], Tensor]]:
    pairs, pixels = the_pairs()
    return [(pairs[a:b], pixels[a : min(b, 4)]) for a, b in MICRO_BATCHES]


def shares(layout: Layout, world: int) -> training_jobs.Shares:
    """All micro-batches on one replica; over two, the second gets the one that has no image."""
    all_batches = micro_batches()
    replicas = world // layout.model_parallel_size
    return [all_batches] if replicas == 1 else [all_batches[:2], all_batches[2:]]


Data = list[tuple[Tokenized, list[Tensor]]]
"""Samples with the images of their places."""


def the_data() -> Data:
    pairs, pixels = the_pairs()
    return list(zip(pairs, images_of(pairs, pixels)))


def reference_loss(model: Reference, frozen: Reference, objective: Sft | Dpo, seen: list[float], data: Data) -> Tensor:
    """`seen`: the rewards of earlier steps, to which this step's are added."""
    total, count = torch.zeros(()), 0
    baseline = sum(seen) / max(len(seen), 1)
    for pair, image in data:
        if objective.kind == "sft":
            chosen = model.branch_logprobs(pair, image)[0]
            total, count = total - chosen.sum(), count + len(chosen)
            continue
        policy = [x.sum() for x in model.branch_logprobs(pair, image)]
        with torch.no_grad():
            fixed = [x.sum() for x in frozen.branch_logprobs(pair, image)]
        lengths = [sum(branch.loss) for branch in pair.branches]
        won, lost = (objective.beta * (p - f) for p, f in zip(policy, fixed))
        prefers = torch.sigmoid(won - lost)
        smooth = objective.label_smoothing
        per_token = (won / lengths[0] - lost / lengths[1]) / objective.beta
        values = {
            "sigmoid": -(1 - smooth) * torch.log(prefers) - smooth * torch.log(1 - prefers),
            "robust": (-(1 - smooth) * torch.log(prefers) + smooth * torch.log(1 - prefers)) / (1 - 2 * smooth),
            "hinge": torch.clamp(1 - (won - lost), min=0),
            "ipo": (per_token - 0.5 / objective.beta) ** 2,
            "bco": -torch.log(torch.sigmoid(won - baseline)) - torch.log(1 - torch.sigmoid(lost - baseline)),
            "sft": -policy[0] / lengths[0],
        }
        total, count = total + sum(weight * values[name] for name, weight in objective.losses.items()), count + 1
        seen += [float(won), float(lost)]
    return total / count


def reference_training(
    encoder: Path,
    head: Path,
    objective: Sft | Dpo,
    trainable: tuple[str, ...] = ("",),
    steps: int = STEPS,
    data: Data | None = None,
) -> dict[str, Any]:
    """`trainable`: prefixes of hub names."""
    data = the_data() if data is None else data
    parts = projector_parts(encoder, head)
    model, frozen = Reference(encoder, head, parts), Reference(encoder, head, parts)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = hub_name(name).startswith(trainable)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-3, betas=(0.9, 0.999), eps=1e-4, weight_decay=0.0)
    gradients: dict[str, Tensor] = {}
    losses, norms = [], []
    rewards: list[float] = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = reference_loss(model, frozen, objective, rewards, data)
        loss.backward()
        if not gradients:
            gradients = {hub_name(n): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        norms.append(float(torch.nn.utils.clip_grad_norm_(learning, training_jobs.CLIP)))
        optimizer.step()
        losses.append(float(loss))
    weights = {hub_name(n): p.detach() for n, p in model.named_parameters()}
    return {"gradients": gradients, "weights": weights, "losses": losses, "norms": norms}


def hub_name(name: str) -> str:
    component, rest = name.split(".", 1)
    if component == "encoder":
        return "vision_model." + rest.removeprefix("vision_model.")
    return rest if component == "llm" else f"multi_modal_projector.{name}"


OBJECTIVES = {
    "dpo": Dpo(beta=0.3),
    "dpo-smooth-sft": Dpo(beta=0.3, label_smoothing=0.1, losses={"sigmoid": 1.0, "sft": 0.5}),
    "sft": Sft(),
}


@pytest.fixture(scope="module")
def expected(checkpoints: tuple[Path, Path]) -> dict[str, dict[str, Any]]:
    return {name: reference_training(*checkpoints, objective) for name, objective in OBJECTIVES.items()}


def worst(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    """Largest difference relative to the largest entry of its tensor, or of all tensors where that one is next to zero."""
    floor = 1e-3 * max(float(t.abs().max()) for t in wanted.values())
    assert all(t.isfinite().all() for t in found.values())  # max() over tuples would let a NaN through
    return max((float((found[n] - t).abs().max() / max(float(t.abs().max()), floor)), n) for n, t in wanted.items())


def check(
    results: list[dict[str, Any]],
    wanted: dict[str, Any],
    learns: tuple[str, ...] = ("vision_model.", "multi_modal_projector.", "model."),
) -> None:
    for result in results:
        trained = {n: t for n, t in wanted["weights"].items() if n in result["weights"]}
        # All but what stands past the feature layer, and the tied copy of the embedding.
        assert len(trained) == len(result["weights"])
        gradients = {n: t for n, t in wanted["gradients"].items() if n in trained}
        for prefix in learns:
            assert any(n.startswith(prefix) and t.abs().max() > 0 for n, t in gradients.items())
        assert worst(result["gradients"], gradients) <= (TOLERANCE, "~")
        assert worst(result["weights"], trained) <= (TOLERANCE, "~")
        for step, found in enumerate(result["results"]):
            assert found.loss == pytest.approx(wanted["losses"][step], rel=TOLERANCE)
            assert found.grad_norm == pytest.approx(wanted["norms"][step], rel=TOLERANCE)


@matrix.layouts(*matrix.TRAINING, slow=matrix.MORE_TRAINING)
def test_dpo_training_equals_plain_torch(layout, world, workers: Workers, checkpoints, expected) -> None:
    name = "dpo"
    results = workers.run(
        training_jobs.train_steps, layout, world, *checkpoints, shares(layout, world), OBJECTIVES[name], STEPS
    )
    check(results, expected[name])


@pytest.mark.parametrize("name", ["dpo-smooth-sft", "sft"])
@matrix.layouts(matrix.DP2, matrix.TP2)
def test_other_objectives_equal_plain_torch(name, layout, world, workers: Workers, checkpoints, expected) -> None:
    batches = shares(layout, world)
    if name == "sft":
        batches = [[([one_branch(p) for p in pairs], pixels) for pairs, pixels in share] for share in batches]
    results = workers.run(training_jobs.train_steps, layout, world, *checkpoints, batches, OBJECTIVES[name], STEPS)
    check(results, expected[name])


@matrix.layouts(matrix.DP2_BUCKETS, matrix.PP2_DP2_OVERLAP)
def test_untied_head_with_overlap(layout, world, workers: Workers, tmp_path: Path) -> None:
    """The output layer's own weight is gathered before it is read."""
    folders = make_checkpoints(tmp_path, tied=False)
    wanted = reference_training(*folders, OBJECTIVES["dpo"])
    check(
        workers.run(
            training_jobs.train_steps, layout, world, *folders, shares(layout, world), OBJECTIVES["dpo"], STEPS
        ),
        wanted,
    )


LOSSES = {
    # A beta and a weight at which the baseline moves the loss by much more than the tolerance.
    "mpo": Dpo(beta=1.0, losses={"sigmoid": 0.8, "bco": 2.0, "sft": 1.0}),
    "ipo-hinge-robust": Dpo(beta=0.3, label_smoothing=0.1, losses={"ipo": 0.1, "hinge": 0.3, "robust": 0.4}),
}


@pytest.mark.parametrize("name", ["mpo", pytest.param("ipo-hinge-robust", marks=pytest.mark.slow)])
@matrix.layouts(matrix.DP2)
def test_losses_of_pairs_equal_plain_torch(name, layout, world, workers: Workers, checkpoints) -> None:
    """Three steps: the first has no baseline, and the second's is 0 since policy and reference began as one."""
    wanted = reference_training(*checkpoints, LOSSES[name], steps=3)
    results = workers.run(
        training_jobs.train_steps, layout, world, *checkpoints, shares(layout, world), LOSSES[name], 3
    )
    check(results, wanted)
    for result in results:
        baselines = [step.metrics.get("reward_baseline", 0.0) for step in result["results"]]
        assert baselines[:2] == [0.0, 0.0] and (baselines[2] != 0) == (name == "mpo")


def one_branch(pair: Tokenized) -> Tokenized:
    return Tokenized(pair.key, pair.prefix, pair.branches[:1], pair.images, pair.views)


STAGES = {
    "projector-only": (
        (ParameterRule("encoder.*", "frozen"), ParameterRule("llm.*", "frozen")),
        ("multi_modal_projector.",),
    ),
    "encoder-frozen": ((ParameterRule("encoder.*", "frozen"),), ("multi_modal_projector.", "model.")),
    "patches-frozen": (
        (ParameterRule("encoder.patch_embedding.*", "frozen"), ParameterRule("encoder.position_embedding.*", "frozen")),
        ("vision_model.encoder.", "multi_modal_projector.", "model."),
    ),
    "llm-layers-only": (
        (
            ParameterRule("encoder.*", "frozen"),
            ParameterRule("projector.*", "frozen"),
            ParameterRule("llm.embedding.*", "frozen"),
        ),
        ("model.layers.", "model.norm."),
    ),
    "encoder-only": (
        (ParameterRule("llm.*", "frozen"), ParameterRule("projector.*", "frozen")),
        ("vision_model.",),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@matrix.layouts(matrix.SINGLE, matrix.TP2, matrix.PP2, matrix.DP2_OVERLAP)
def test_partly_frozen_models_equal_plain_torch(stage, layout, world, workers: Workers, checkpoints) -> None:
    """Also where a pipeline stage, or a whole rank, has nothing that trains."""
    rules, learns = STAGES[stage]
    objective = OBJECTIVES["dpo"]
    wanted = reference_training(*checkpoints, objective, learns)
    batches = shares(layout, world)
    recompute = Recompute(encoder="full", llm="full")
    results = workers.run(
        training_jobs.train_steps, layout, world, *checkpoints, batches, objective, STEPS, rules, recompute
    )
    check(results, wanted, learns)


@pytest.mark.parametrize("mode", ["selective", "full"])
@matrix.layouts(matrix.SINGLE, matrix.TP2)
def test_recompute_changes_nothing(mode, layout, world, workers: Workers, checkpoints) -> None:
    arguments = (*checkpoints, shares(layout, world), OBJECTIVES["dpo"], 1, ())
    plain = workers.run(training_jobs.train_steps, layout, world, *arguments)[0]["gradients"]
    again = workers.run(training_jobs.train_steps, layout, world, *arguments, Recompute(encoder=mode, llm=mode))[0][
        "gradients"
    ]
    # Selective recompute repeats the very same sums; full recompute adds up residual gradients in another order.
    assert worst(again, plain) <= (0.0 if mode == "selective" else 2e-6, "~")


def test_reference_clips(expected) -> None:
    """The clip is in force, so that a wrong norm would show in the weights."""
    assert all(norm > training_jobs.CLIP for norm in expected["dpo"]["norms"])
