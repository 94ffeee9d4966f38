"""Recall, precision and F1 of predictions of several classes at once, by class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

Counted = npt.NDArray[np.int64]
Shares = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Counts:
    """Of each class `[classes]`: how often it was there and said to be, there and not said to be, said to be and not there."""

    true_positives: Counted
    false_negatives: Counted
    false_positives: Counted

    @classmethod
    def of(cls, expected: Tensor, predicted: Tensor) -> Counts:
        """Both `[samples, classes]`, bool."""
        both, there, said = (one.sum(dim=0).cpu().numpy() for one in (expected & predicted, expected, predicted))
        return cls(both, there - both, said - both)

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.true_positives + other.true_positives,
            self.false_negatives + other.false_negatives,
            self.false_positives + other.false_positives,
        )

    @property
    def present(self) -> npt.NDArray[np.intp]:
        """The classes that are there at least once, which macro means are over: `[present]`."""
        return np.flatnonzero(self.true_positives + self.false_negatives)

    @property
    def recall(self) -> Shares:
        """TP / (TP + FN); 0 where nothing is there."""
        return _share(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def precision(self) -> Shares:
        """TP / (TP + FP); 0 where nothing is said to be there."""
        return _share(self.true_positives, self.true_positives + self.false_positives)

    @property
    def f1(self) -> Shares:
        """The harmonic mean of both, 2 TP / (2 TP + FP + FN); 0 where nothing is there, nor said to be."""
        return _share(2 * self.true_positives, 2 * self.true_positives + self.false_positives + self.false_negatives)


def _share(part: Counted, whole: Counted) -> Shares:
    return np.asarray(part / np.maximum(whole, 1), np.float64)
