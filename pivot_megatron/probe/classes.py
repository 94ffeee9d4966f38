"""The linear probe of several encoders on the same draws of training images, and how they differ."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pivot_megatron.errors import UserError
from pivot_megatron.probe.features import Say, pooled_features, silent
from pivot_megatron.probe.image_set import ImageSet
from pivot_megatron.probe.linear import (
    ProbeResult,
    few_a_class,
    linear_probe,
    prototype_accuracy,
    prototype_right,
    require_some_to_hold_out,
)
from pivot_megatron.probe.opening import opened, require_sources
from pivot_megatron.probe.table import Score, as_json, as_table, figures

Classifier = Literal["logistic", "prototypes"]
CLASSIFIERS: Mapping[Classifier, str] = {"logistic": "logistic regression", "prototypes": "the nearest class mean"}
"""What reads classes from features, as a page names it. Prototypes are there at once: nothing is fitted."""


@dataclass(frozen=True)
class LinearSettings:
    """`per_class`: training images of each class in a draw. `draws`: how many, with seeds from `seed` on."""

    train: Path
    test: Path
    per_class: int = 50
    draws: int = 3
    seed: int = 777
    projected: bool = False
    feature_layer: int | None = None
    batch: int = 64
    classifier: Classifier = "logistic"


@dataclass(frozen=True)
class LinearReport:
    """`scores`: whether each test image was right, in each draw."""

    settings: LinearSettings
    classes: int
    test_images: int
    scores: tuple[Score, ...]

    def as_json(self, **facts: Any) -> str:
        return as_json(self.settings, self.scores, classes=self.classes, test_images=self.test_images, **facts)

    def figures(self) -> dict[str, float]:
        return figures("accuracy", self.scores)

    def as_text(self) -> str:
        return as_table("accuracy", self.scores)


def linear_score(encoder: str, features: str, draws: Sequence[ProbeResult], prototypes: Sequence[float]) -> Score:
    """Of one encoder by logistic regression, by draw. `prototypes`: accuracies of the nearest class mean."""
    right = np.stack([draw.right for draw in draws]).astype(np.float64)
    best = statistics.fmean(draw.accuracy_best_c_on_test for draw in draws)
    return Score(
        encoder,
        right,
        {"C on test": f"{100 * best:.2f}", "prototypes": f"{100 * statistics.fmean(prototypes):.2f}"},
        {"features": features, "draws": [_record(draw) for draw in draws], "prototypes": list(prototypes)},
        counted=True,
    )


def prototype_score(encoder: str, features: str, draws: Sequence[npt.NDArray[np.bool_]]) -> Score:
    """Of one encoder by the nearest class mean: by draw, `[samples]`, which were right."""
    right = np.stack(draws).astype(np.float64)
    told = [{"accuracy": float(one.mean()), "correct": int(one.sum()), "total": len(one)} for one in draws]
    return Score(encoder, right, {}, {"features": features, "draws": told}, counted=True)


def _record(draw: ProbeResult) -> dict[str, object]:
    return {name: value for name, value in asdict(draw).items() if name != "right"}


def require_sets(settings: LinearSettings, cache: Path | None = None) -> None:
    """Raises UserError for what `probe_encoders` would refuse of the images and draws, before work is done that is to be probed.
    No image is decoded. `cache`: that of `probe_encoders`, which then need not list tars again."""
    _opened_sets(settings, cache)


@dataclass(frozen=True)
class _Sets:
    """`draws`: indices of `train`, one array a draw."""

    train: ImageSet
    test: ImageSet
    draws: tuple[npt.NDArray[np.intp], ...]


def _opened_sets(settings: LinearSettings, cache: Path | None) -> _Sets:
    _require_counts(settings)
    train, test = ImageSet.opened(settings.train, cache), ImageSet.opened(settings.test, cache)
    _require_matching(settings, train, test)
    _require_enough(settings, train)
    draws = tuple(few_a_class(train.labels, settings.per_class, settings.seed + n) for n in range(settings.draws))
    if settings.classifier == "logistic":
        require_some_to_hold_out(train.labels[draws[0]])
    if len({draw.tobytes() for draw in draws}) < len(draws):
        raise UserError(
            f"--draws: expected draws that differ, found that {settings.per_class} a class are all there are of "
            f"{settings.train}; lower --per-class, or set --draws 1"
        )
    return _Sets(train, test, draws)


def _require_counts(settings: LinearSettings) -> None:
    if min(settings.draws, settings.per_class, settings.batch) < 1:
        raise UserError(
            f"--per-class, --draws, --batch: expected 1 or more, found {settings.per_class}, {settings.draws} and "
            f"{settings.batch}"
        )


def probe_encoders(
    encoders: Sequence[Path], settings: LinearSettings, cache: Path | None = None, say: Say = silent
) -> LinearReport:
    """Raises UserError for sets that do not go together, too few images of a class, draws that are the same, and an encoder that
    is not whole."""
    require_sources(encoders, settings.projected)
    sets = _opened_sets(settings, cache)
    scores = tuple(_score(path, settings, sets, cache, say) for path in encoders)
    return LinearReport(settings, len(sets.train.classes), len(sets.test), scores)


def _score(path: Path, settings: LinearSettings, sets: _Sets, cache: Path | None, say: Say) -> Score:
    train, test = sets.train, sets.test
    used = np.unique(np.concatenate(sets.draws))
    with opened(path, settings.feature_layer, settings.projected) as encoder:
        pooled = partial(pooled_features, encoder, batch=settings.batch, cache=cache)
        train_x = pooled(train, used.tolist(), say=lambda told: say(f"{path}: train, {told}"))
        test_x = pooled(test, say=lambda told: say(f"{path}: test, {told}"))
        features = encoder.place.told + (", projected" if settings.projected else "")
    drawn = [(train_x[np.searchsorted(used, draw)], train.labels[draw]) for draw in sets.draws]
    if settings.classifier == "prototypes":
        right = [prototype_right(x, y, test_x, test.labels) for x, y in drawn]
        return prototype_score(str(path), features, right)
    found = []
    for n, (x, y) in enumerate(drawn):
        found.append(linear_probe(x, y, test_x, test.labels, seed=settings.seed + n, cache=cache))
        say(f"{path}: draw {n + 1} of {len(drawn)}, accuracy {found[-1].accuracy:.4f}")
    prototypes = [prototype_accuracy(x, y, test_x, test.labels) for x, y in drawn]
    return linear_score(str(path), features, found, prototypes)


def _require_matching(settings: LinearSettings, train: ImageSet, test: ImageSet) -> None:
    if len(train.classes) < 2:
        raise UserError(f"{settings.train}: expected images of 2 classes or more, found 1, {train.classes[0]}")
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise UserError(
            f"{settings.test}: expected the {len(train.classes)} classes of {settings.train}, found {len(test.classes)}; "
            f"{odd[0]} is in one alone"
        )
    if both := set(train.names) & set(test.names):
        raise UserError(
            f"--train, --test: expected images that are in one alone, found {len(both)} in both (first: {min(both)})"
        )


def _require_enough(settings: LinearSettings, train: ImageSet) -> None:
    counts = np.bincount(train.labels, minlength=len(train.classes))
    if counts.min() < settings.per_class:
        raise UserError(
            f"{settings.train}: expected {settings.per_class} images of every class, found {counts.min()} of "
            f"{train.classes[int(counts.argmin())]}; set --per-class to as many as there are"
        )
