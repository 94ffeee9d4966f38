"""The head over patches: counts against scikit-learn, the schedule's closed form, planted classes and noise."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, precision_score, recall_score

from pivot_megatron.probe import patch_head
from pivot_megatron.probe.kept import digest_of
from pivot_megatron.probe.multilabel import Counts
from pivot_megatron.probe.patch_head import FLOOR, PEAK, judged, kept_head, learning_rate, new_head, train_head
from pivot_megatron.probe.patch_set import PatchSet


def bits(shape: tuple[int, int], shares: object, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < np.asarray(shares)


def patch_set(features: np.ndarray, there: np.ndarray, grid: tuple[int, int] = (4, 4)) -> PatchSet:
    """Of one file."""
    count = len(features) // math.prod(grid)
    packed = np.packbits(there, axis=1)
    half = features.astype(np.float16)
    return PatchSet((half,), (packed,), (grid,) * count, ((1.0, 1.0),) * count, there.shape[1], digest_of(half, packed))


def test_shares_are_scikit_learns() -> None:
    """Of classes of which one is never there, one never said to be, and one neither."""
    expected = bits((500, 7), [0.5, 0.1, 0.0, 0.9, 0.3, 0.0, 0.02], 0)
    predicted = bits((500, 7), [0.5, 0.1, 0.2, 0.9, 0.0, 0.0, 0.02], 1)
    parts = [
        Counts.of(torch.from_numpy(expected[n]), torch.from_numpy(predicted[n])) for n in (slice(123), slice(123, 500))
    ]
    found = parts[0] + parts[1]
    present = np.flatnonzero(expected.any(axis=0))
    assert found.present.tolist() == present.tolist() == [0, 1, 3, 4, 6]
    for shares, score in ((found.recall, recall_score), (found.precision, precision_score), (found.f1, f1_score)):
        by_class = score(expected, predicted, average=None, zero_division=0)
        np.testing.assert_allclose(shares, by_class, rtol=1e-15)
        macro = score(expected, predicted, labels=present, average="macro", zero_division=0)
        assert shares[present].mean() == pytest.approx(macro, rel=1e-15)


@pytest.mark.parametrize(("steps", "warm_up"), [(3160, 500), (2500, 500), (1000, 200), (40, 8), (4, 0), (1, 0)])
def test_the_learning_rate_is_its_formula(steps: int, warm_up: int) -> None:
    """3160: 20,210 images by 32, five times."""
    found = [learning_rate(n, steps) for n in range(steps)]
    assert found[:warm_up] == pytest.approx([PEAK * (n + 1) / warm_up for n in range(warm_up)])
    assert max(found) == found[warm_up] == PEAK
    if steps > 1:
        assert found[-1] == pytest.approx(FLOOR, rel=1e-12)
    if steps > 1 and (steps - warm_up) % 2:
        assert found[(steps + warm_up - 1) // 2] == pytest.approx((PEAK + FLOOR) / 2)
    assert np.all(np.diff(found[warm_up:]) < 0)


def test_a_planted_class_is_found_and_the_head_that_is_best_is_kept() -> None:
    there = bits((64 * 16, 5), 0.3, 0)
    features = there @ np.random.default_rng(1).normal(size=(5, 24)) + np.random.default_rng(2).normal(
        0, 0.05, (64 * 16, 24)
    )
    train, test = patch_set(features[: 48 * 16], there[: 48 * 16]), patch_set(features[48 * 16 :], there[48 * 16 :])
    found = train_head(train, test, 20, seed=3)
    recalls = [float(counts.recall.mean()) for counts in found.epochs]
    assert max(recalls) > 0.99 and found.best == int(np.argmax(recalls))
    assert judged(found.head, test).true_positives.tolist() == found.epochs[found.best].true_positives.tolist()
    with torch.no_grad():
        said = torch.sigmoid(found.head(test.of(range(16))[0])) > 0.5
    by_sklearn = recall_score(there[48 * 16 :], said, average="macro")
    assert recalls[found.best] == pytest.approx(by_sklearn, rel=1e-15)


def test_of_noise_a_head_says_what_is_there_more_often_than_not() -> None:
    """Which is all there is to learn: recall is 1 of a class in most patches, with its share as precision, and 0 of others."""
    there, features = bits((256 * 16, 3), [0.85, 0.15, 0.15], 0), np.random.default_rng(1).normal(size=(256 * 16, 4))
    cut = 192 * 16
    counts = train_head(patch_set(features[:cut], there[:cut]), patch_set(features[cut:], there[cut:]), 5, 0).epochs[-1]
    assert counts.recall == pytest.approx([1.0, 0.0, 0.0], abs=0.02)
    assert counts.precision[0] == pytest.approx(0.85, abs=0.03)


def test_the_same_seed_gives_the_same_head_and_another_another() -> None:
    there = bits((40 * 16, 3), 0.4, 0)
    one = patch_set(np.random.default_rng(1).normal(size=(40 * 16, 6)), there)
    heads = [train_head(one, one, 2, seed).head for seed in (5, 5, 6)]
    weights = [torch.cat([p.flatten() for p in head.parameters()]) for head in heads]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    before = torch.get_rng_state()
    new_head(6, 3, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_step_is_adamws_by_hand() -> None:
    """One step of one image, so at the highest rate: each weight moves by it, against its gradient's sign, and decays."""
    there = bits((16, 3), 0.4, 0)
    one = patch_set(np.random.default_rng(1).normal(size=(16, 6)), there)
    before, after = new_head(6, 3, 9), train_head(one, one, 1, 9).head
    features, labels = one.of([0])
    probability = torch.sigmoid(before(features))
    loss = -(labels * probability.log() + ~labels * (1 - probability).log()).mean()
    for parameter, gradient, moved in zip(
        before.parameters(), torch.autograd.grad(loss, list(before.parameters())), after.parameters()
    ):
        expected = parameter * (1 - PEAK * 0.01) - PEAK * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(moved, expected, atol=2e-6, rtol=0)


def test_a_head_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And again where its seed, its epochs, its patches or the code that trains it are others."""
    draw = np.random.default_rng(1)
    there = bits((40 * 16, 3), 0.4, 0)
    one, other = (patch_set(draw.normal(size=(40 * 16, 6)), there) for _ in range(2))
    trained: list[int] = []
    monkeypatch.setattr(patch_head, "train_head", lambda *words: trained.append(1) or train_head(*words))
    first, again = (kept_head(one, one, 3, 5, tmp_path) for _ in range(2))
    assert len(trained) == 1 and (first.best, len(first.epochs)) == (again.best, len(again.epochs)) == (again.best, 3)
    plain = train_head(one, one, 3, 5)
    for found in (first, again):
        assert all(torch.equal(a, b) for a, b in zip(found.head.parameters(), plain.head.parameters(), strict=True))
        for name in ("true_positives", "false_negatives", "false_positives"):
            for a, b in zip(found.epochs, plain.epochs, strict=True):
                np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    for words in ((one, one, 3, 6), (one, one, 2, 5), (one, other, 3, 5), (other, one, 3, 5)):
        kept_head(*words, tmp_path)
    assert len(trained) == 5
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:-30])
    kept_head(one, one, 3, 5, tmp_path)
    assert len(trained) == 6
    monkeypatch.setattr(patch_head, "made_by", lambda *_: "another torch")
    kept_head(one, one, 3, 5, tmp_path)
    assert len(trained) == 7 and {file.suffix for file in tmp_path.iterdir()} == {".npz"}
