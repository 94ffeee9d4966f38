"""How well a logistic regression, or the nearest class mean, reads classes from frozen features."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from threadpoolctl import threadpool_limits

from pivot_megatron.errors import UserError
from pivot_megatron.probe.image_set import Labels
from pivot_megatron.probe.interval import wilson
from pivot_megatron.probe.kept import Features, digest_of, kept, made_by
from pivot_megatron.runtime.device import available_cores

C_GRID = (0.01, 0.03, 0.1, 0.316, 1.0, 3.16)
"""Inverse L2 strengths of the paper's probe (arXiv 2510.16333)."""

_HELD_OUT = 0.2


@dataclass(frozen=True)
class ProbeResult:
    """One probe. Accuracies are fractions; `low` and `high` are the 95 % Wilson interval of `accuracy`.

    `c` was chosen on a held-out part of the training set. `c_best_on_test` was chosen on the test set itself, as
    the paper does, so `accuracy_best_c_on_test` is optimistic and only there to compare with published numbers. `right`
    `[samples]`: which test samples were.
    """

    accuracy: float
    low: float
    high: float
    correct: int
    total: int
    c: float
    accuracy_best_c_on_test: float
    c_best_on_test: float
    train_total: int
    right: npt.NDArray[np.bool_] = field(compare=False, repr=False)


def linear_probe(
    train_x: Features, train_y: Labels, test_x: Features, test_y: Labels, *, seed: int, cache: Path | None = None
) -> ProbeResult:
    """Fit logistic regressions (lbfgs, L2, at most 1000 iterations) over `C_GRID` and score them on the test set.

    C is chosen on a stratified held-out fifth of the training set drawn with `seed`, the strongest regularisation
    winning ties, then refitted on all of it.

    Args:
        train_x: `[samples, hidden]`.
        train_y: `[samples]`, class indices.
        test_x: as `train_x`, of the test set.
        test_y: as `train_y`, of the test set.
        cache: a folder that keeps what the fits get right for the next time that they would be made of the same arrays.

    Raises:
        UserError: too few training samples of a class to hold some out.
    """
    require_some_to_hold_out(train_y)
    fit_x, held_x, fit_y, held_y = train_test_split(
        train_x, train_y, test_size=_HELD_OUT, stratify=train_y, random_state=seed
    )
    held_correct = [int(right.sum()) for right in _right_by_c(fit_x, fit_y, held_x, held_y, cache)]
    right = _right_by_c(train_x, train_y, test_x, test_y, cache)
    test_correct = [int(one.sum()) for one in right]
    chosen = int(np.argmax(held_correct))
    best = int(np.argmax(test_correct))
    interval = wilson(test_correct[chosen], len(test_y))
    return ProbeResult(
        accuracy=test_correct[chosen] / len(test_y),
        low=interval.low,
        high=interval.high,
        correct=test_correct[chosen],
        total=len(test_y),
        c=C_GRID[chosen],
        accuracy_best_c_on_test=test_correct[best] / len(test_y),
        c_best_on_test=C_GRID[best],
        train_total=len(train_y),
        right=right[chosen],
    )


def require_some_to_hold_out(labels: Labels) -> None:
    """Raises UserError where a stratified fifth of the training samples, of classes `labels` `[samples]`, would lack a class."""
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2 or counts.min() < 2 or _HELD_OUT * len(labels) < len(classes):
        raise UserError(
            f"linear probe: expected at least 2 classes, 2 training samples of each and {1 / _HELD_OUT:.0f} a class "
            f"overall, found {len(labels)} samples of {len(classes)} classes, the rarest with "
            f"{counts.min(initial=len(labels))}; add training samples"
        )


def _right_by_c(
    train_x: Features, train_y: Labels, test_x: Features, test_y: Labels, cache: Path | None
) -> npt.NDArray[np.bool_]:
    """`[C, samples]`: of each of C_GRID, fitted beside one another: threads of one product wait for each other on a machine that
    does more."""

    def work() -> npt.NDArray[np.bool_]:
        threads = min(available_cores(), len(C_GRID))
        with threadpool_limits(available_cores() // threads, user_api="blas"), ThreadPoolExecutor(threads) as pool:
            return np.stack(list(pool.map(lambda c: _right(c, train_x, train_y, test_x, test_y), C_GRID)))

    made = made_by(__file__, "scikit-learn", "scipy", "numpy")
    return kept(work, cache, f"right {made} {digest_of(train_x, train_y, test_x, test_y)}")


def _right(c: float, train_x: Features, train_y: Labels, test_x: Features, test_y: Labels) -> npt.NDArray[np.bool_]:
    # The default penalty is L2; naming it is deprecated.
    model = LogisticRegression(C=c, solver="lbfgs", max_iter=1000)
    model.fit(train_x, train_y)
    found: npt.NDArray[np.bool_] = model.predict(test_x) == test_y
    return found


def prototype_right(train_x: Features, train_y: Labels, test_x: Features, test_y: Labels) -> npt.NDArray[np.bool_]:
    """`[samples]`: which test samples `[samples, hidden]` have their highest cosine similarity to the mean of their own class's
    training samples, all of length 1: a fast proxy, with nothing to fit."""
    classes = np.unique(train_y)
    means = np.stack([train_x[train_y == one].mean(axis=0) for one in classes])
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), np.finfo(means.dtype).tiny)
    right: npt.NDArray[np.bool_] = classes[np.argmax(test_x @ means.T, axis=1)] == test_y
    return right


def prototype_accuracy(train_x: Features, train_y: Labels, test_x: Features, test_y: Labels) -> float:
    """The share that `prototype_right` finds."""
    return float(prototype_right(train_x, train_y, test_x, test_y).mean())


def few_a_class(labels: Labels, count: int, seed: int) -> npt.NDArray[np.intp]:
    """Indices of `count` samples of every class, drawn with `seed`, in order. Raises ValueError where one has fewer."""
    draw = np.random.default_rng(seed)
    return np.sort(np.concatenate([draw.choice(np.flatnonzero(labels == n), count, False) for n in np.unique(labels)]))
