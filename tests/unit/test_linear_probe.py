from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from PIL import Image
from sklearn.neighbors import NearestCentroid

from pivot_megatron.errors import UserError
from pivot_megatron.probe import linear
from pivot_megatron.probe.digits import digits
from pivot_megatron.probe.interval import crossed_change, crossed_mean, mean_interval, wilson
from pivot_megatron.probe.linear import (
    C_GRID,
    ProbeResult,
    few_a_class,
    linear_probe,
    prototype_accuracy,
    prototype_right,
)


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    # Closed form; 81/263 is Newcombe's worked example (0.2553, 0.3662) and 0/20 and 29/29 are his boundary cases.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_matches_published_values(correct: int, total: int, low: float, high: float) -> None:
    interval = wilson(correct, total)
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


def test_wilson_refuses_impossible_counts() -> None:
    with pytest.raises(ValueError, match="correct=3, total=2"):
        wilson(3, 2)


def test_planted_features_score_everything() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 4
    features = (4 * np.eye(4)[labels] + 0.05 * rng.normal(size=(200, 4))).astype(np.float32)
    result = linear_probe(features[:120], labels[:120], features[120:], labels[120:], seed=0)
    assert (result.accuracy, result.correct, result.total, result.train_total) == (1.0, 80, 80, 120)
    assert (result.low, result.high) == (wilson(80, 80).low, 1.0)


def test_fits_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And again where the seed, a feature, a label, or the code that fits are others."""
    rng = np.random.default_rng(0)
    labels, features = np.arange(120) % 4, rng.normal(size=(120, 8)).astype(np.float32)
    fits: list[float] = []
    right = linear._right
    monkeypatch.setattr(linear, "_right", lambda c, *arrays: fits.append(c) or right(c, *arrays))

    def fitted(seed: int = 0, features: np.ndarray = features, labels: np.ndarray = labels) -> tuple[ProbeResult, int]:
        fits.clear()
        words = (features[:60], labels[:60], features[60:], labels[60:])
        return linear_probe(*words, seed=seed, cache=tmp_path), len(fits)

    one_pass, plain = len(C_GRID), linear_probe(features[:60], labels[:60], features[60:], labels[60:], seed=0)
    assert fitted() == (plain, 2 * one_pass)
    assert fitted() == (plain, 0)
    assert fitted(seed=1)[1] == one_pass  # the same images again for the test, others held out
    moved, named = features.copy(), labels.copy()
    moved[-1, 0] = np.nextafter(moved[-1, 0], np.float32(9))
    named[[-1, -2]] = named[[-2, -1]]
    assert (
        fitted(features=moved)[1] == fitted(labels=named)[1] == one_pass
    )  # of the test set, so what is held out is as it was
    monkeypatch.setattr(linear, "made_by", lambda *_: "another scikit-learn")
    assert fitted()[1] == 2 * one_pass


def test_random_features_score_chance() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(800) % 4
    features = rng.normal(size=(800, 8)).astype(np.float32)
    result = linear_probe(features[:400], labels[:400], features[400:], labels[400:], seed=0)
    assert result.accuracy == pytest.approx(0.25, abs=0.07)
    assert result.accuracy_best_c_on_test >= result.accuracy
    assert result.c in C_GRID and result.c_best_on_test in C_GRID
    assert result == linear_probe(features[:400], labels[:400], features[400:], labels[400:], seed=0)


def test_too_few_samples_are_the_users_error() -> None:
    labels = np.array([0, 0, 0, 1])
    features = np.zeros((4, 2), np.float32)
    with pytest.raises(UserError, match="4 samples of 2 classes, the rarest with 1"):
        linear_probe(features, labels, features, labels, seed=0)


def test_prototypes_are_the_nearest_class_means() -> None:
    """By hand: two classes on the axes, a test sample of the first that leans to the second."""
    train = np.array([[1, 0], [0.8, 0.6], [0, 1]], np.float32)
    test = np.array([[1, 0], [0.5, 0.75**0.5], [0, 1]], np.float32)
    labels = np.array([0, 0, 1])
    assert prototype_accuracy(train, labels, test, labels) == pytest.approx(2 / 3)
    cosine = NearestCentroid().fit(train, labels)  # of unit length, nearest is most alike
    means = cosine.centroids_ / np.linalg.norm(cosine.centroids_, axis=1, keepdims=True)
    assert (np.argmax(test @ means.T, axis=1) == labels).mean() == pytest.approx(2 / 3)


def test_prototypes_are_scikit_learns_nearest_centroids() -> None:
    """Sample by sample, where centroids are brought to length 1: of vectors of that length nearest is of the highest cosine."""
    draw = np.random.default_rng(0)
    labels = draw.permutation(np.repeat([2, 5, 7, 9], 30))
    features = (0.4 * np.eye(10)[labels] + draw.normal(0, 0.3, (120, 10))).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    train, test = slice(0, 60), slice(60, 120)
    found = prototype_right(features[train], labels[train], features[test], labels[test])
    reference = NearestCentroid().fit(features[train], labels[train])
    reference.centroids_ /= np.linalg.norm(reference.centroids_, axis=1, keepdims=True)
    np.testing.assert_array_equal(found, reference.predict(features[test]) == labels[test])
    assert 0.4 < found.mean() < 0.95


def test_a_draw_takes_as_many_of_each_class() -> None:
    labels = np.array([2, 0, 1] * 20)
    draw = few_a_class(labels, 5, seed=1)
    assert np.bincount(labels[draw]).tolist() == [5, 5, 5] and len(set(draw)) == 15
    assert not np.array_equal(draw, few_a_class(labels, 5, seed=2))
    np.testing.assert_array_equal(draw, few_a_class(labels, 5, seed=1))


def test_interval_of_a_mean_is_students() -> None:
    values = [0.61, 0.64, 0.60, 0.66, 0.63]
    expected = scipy.stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (mean_interval(values).low, mean_interval(values).high) == pytest.approx(tuple(expected), abs=1e-12)
    assert not np.isfinite(mean_interval([0.5]).low)


def test_a_crossed_interval_is_students_where_one_side_is_single() -> None:
    values = np.array([0.61, 0.64, 0.60, 0.66, 0.63])
    for one in (values[None], values[:, None]):
        assert crossed_mean(one) == (pytest.approx(values.mean()), mean_interval(values.tolist()))
    assert not np.isfinite(crossed_mean(np.array([[0.5]]))[1].low)
    assert crossed_mean(np.ones((3, 4)))[1].low == 1.0


def test_a_crossed_interval_holds_the_truth_nineteen_times_in_twenty() -> None:
    """Of draws and samples with effects of their own. Over draws alone it would hold it far less often."""
    rng, crossed, draws_alone, trials = np.random.default_rng(0), 0, 0, 2000
    for _ in range(trials):
        draws, samples = rng.normal(0, 0.02, (3, 1)), rng.normal(0, 0.5, (1, 200))
        values = draws + samples + rng.normal(0, 0.3, (3, 200))
        crossed += 0.0 in crossed_mean(values)[1]
        draws_alone += 0.0 in mean_interval(values.mean(axis=1).tolist())
    assert 0.935 < crossed / trials < 0.985
    assert draws_alone / trials < 0.93


@pytest.mark.parametrize(
    ("draws", "between_draws", "between_samples", "low", "high"),
    # Variances of effects as shares of the mean's that the residual has: none, as much, and much more.
    [
        (3, 0.0, 0.0, 0.975, 0.995),
        (5, 0.0, 0.0, 0.98, 0.998),
        (3, 1.0, 0.0, 0.95, 0.98),
        (3, 10.0, 0.0, 0.915, 0.945),
        (5, 10.0, 0.0, 0.935, 0.962),
        (3, 0.0, 10.0, 0.945, 0.97),
        (2, 10.0, 0.0, 0.86, 0.9),
    ],
)
def test_how_often_a_crossed_interval_holds_the_truth(
    draws: int, between_draws: float, between_samples: float, low: float, high: float
) -> None:
    """As the page of the probes has it: more often than it says where the residual is all there is, less where there are two
    draws and they are all."""
    rng, samples, held, trials = np.random.default_rng(0), 60, 0, 2000
    for _ in range(trials):
        rows = rng.normal(0, (between_draws / samples) ** 0.5, (draws, 1))
        columns = rng.normal(0, (between_samples / draws) ** 0.5, (1, samples))
        held += 0.0 in crossed_mean(rows + columns + rng.normal(0, 1, (draws, samples)))[1]
    assert low < held / trials < high


@pytest.mark.parametrize(
    ("lost", "gained", "total", "centre", "error"),
    [
        (4, 26, 48, 0.44, 0.09448809),  # of R's statpsych 2.0, ci.prop.ps(.05, 12, 4, 26, 6)
        (5, 64, 100, 0.5784314, 0.05953213),  # of R's vcmeta, se.prop.ps(16, 64, 5, 15)
        (7, 1, 21, -6 / 23, (10 / 23 - (6 / 23) ** 2) ** 0.5 / 23**0.5),  # by hand
        (0, 0, 300, 0.0, (2 / 302 / 302) ** 0.5),
    ],
)
def test_a_change_of_one_draw_is_bonett_and_prices(
    lost: int, gained: int, total: int, centre: float, error: float
) -> None:
    changes = np.repeat([-1.0, 1.0, 0.0], [lost, gained, total - lost - gained])[None]
    mean, interval = crossed_change(changes)
    assert mean == pytest.approx((gained - lost) / total)
    half = scipy.stats.t.ppf(0.975, total + 1) * error * ((total + 2) / (total + 1)) ** 0.5
    assert (interval.low, interval.high) == pytest.approx((centre - half, centre + half), abs=1e-7)


def test_a_change_lies_between_minus_one_and_one() -> None:
    assert crossed_change(np.ones((1, 4)))[1].high == 1.0 and crossed_change(-np.ones((2, 4)))[1].low == -1.0
    assert not np.isfinite(crossed_change(np.array([[1.0]]))[1].low)


def test_a_change_that_was_never_seen_is_not_ruled_out() -> None:
    """Within a tenth of the rule of three, and alike however many draws agree."""
    for draws in (1, 3, 15):
        for samples in (100, 1800):
            interval = crossed_change(np.zeros((draws, samples)))[1]
            assert interval.high == -interval.low == pytest.approx(3 / samples, rel=0.1)


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize(("lost", "gained"), [(0.0, 0.02), (0.02, 0.1), (0.1, 0.1)])
def test_a_change_holds_the_truth_nineteen_times_in_twenty(draws: int, lost: float, gained: float) -> None:
    """Of 50 samples, most of whose changes all draws share; without the two that are added it fails where changes are rare."""
    rng, held, plain, trials = np.random.default_rng(0), 0, 0, 600
    for _ in range(trials):
        found = rng.choice([-1.0, 1.0, 0.0], (draws + 1, 50), p=[lost, gained, 1 - lost - gained])
        changes = np.where(rng.random(50) < 0.8, found[:1], found[1:])
        held += gained - lost in crossed_change(changes)[1]
        plain += gained - lost in crossed_mean(changes)[1]
    assert held / trials > 0.94
    assert lost > 0 or plain / trials < 0.9


def test_digits_are_fixed_and_stratified() -> None:
    train, test = digits(24)
    assert (len(train), len(test)) == (1257, 540)
    assert set(np.bincount(test.labels)) <= {52, 53, 54, 55}
    assert test.read(0).startswith(b"\x89PNG") and digits(24)[1].fingerprint == test.fingerprint
    image = Image.open(io.BytesIO(test.read(0)))
    assert (image.size, image.mode) == ((24, 24), "RGB")
    assert not {train.read(n) for n in range(len(train))} & {test.read(n) for n in range(len(test))}
