"""The linear probe of several encoders on the same draws of training images, and how they differ."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pivot_megatron.errors import UserError
from pivot_megatron.probe.encoder import opened
from pivot_megatron.probe.features import Say, pooled_features, silent
from pivot_megatron.probe.image_set import ImageSet
from pivot_megatron.probe.interval import Interval, change_text, mean_interval, wilson
from pivot_megatron.probe.linear import ProbeResult, few_a_class, linear_probe, prototype_accuracy


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


@dataclass(frozen=True)
class EncoderScore:
    """Of one encoder, by draw. `prototypes`: accuracies of the nearest class mean."""

    encoder: str
    features: str
    draws: tuple[ProbeResult, ...]
    prototypes: tuple[float, ...]

    @property
    def accuracies(self) -> list[float]:
        return [draw.accuracy for draw in self.draws]

    @property
    def interval(self) -> Interval:
        """Of the accuracy: over the draws, or, of a single one, over the test images."""
        if len(self.draws) > 1:
            return mean_interval(self.accuracies)
        return wilson(self.draws[0].correct, self.draws[0].total)


@dataclass(frozen=True)
class LinearReport:
    settings: LinearSettings
    classes: int
    test_images: int
    scores: tuple[EncoderScore, ...]

    def differences(self) -> list[tuple[float, Interval]]:
        """Of each encoder after the first from the first, draw by draw: mean, and interval over the draws."""
        first, *others = self.scores
        paired = [[b - a for a, b in zip(first.accuracies, one.accuracies, strict=True)] for one in others]
        return [(statistics.fmean(pairs), mean_interval(pairs)) for pairs in paired]

    def as_json(self) -> str:
        scores = [
            {**asdict(score), "mean": statistics.fmean(score.accuracies), "interval": asdict(score.interval)}
            for score in self.scores
        ]
        against = [
            {"encoder": score.encoder, "difference": mean, "interval": asdict(interval)}
            for score, (mean, interval) in zip(self.scores[1:], self.differences(), strict=True)
        ]
        told = {"settings": asdict(self.settings), "classes": self.classes, "test_images": self.test_images}
        return json.dumps(told | {"scores": scores, "against_the_first": against}, indent=2, default=str)

    def as_text(self) -> str:
        """A line an encoder, in per cent."""
        width = max(len(score.encoder) for score in self.scores)
        lines = [f"{'encoder':<{width}}  accuracy  95 % interval   C on test  prototypes  against the first"]
        changes = ["", *(change_text(mean, interval) for mean, interval in self.differences())]
        for score, change in zip(self.scores, changes, strict=True):
            low, high = 100 * max(score.interval.low, 0.0), 100 * min(score.interval.high, 1.0)
            on_test = 100 * statistics.fmean(draw.accuracy_best_c_on_test for draw in score.draws)
            means = 100 * statistics.fmean(score.prototypes)
            lines.append(
                f"{score.encoder:<{width}}  {100 * statistics.fmean(score.accuracies):8.2f}  {low:6.2f} - {high:6.2f}  "
                f"{on_test:9.2f}  {means:10.2f}  {change}".rstrip()
            )
        return "\n".join(lines)


def probe_encoders(
    encoders: Sequence[Path], settings: LinearSettings, cache: Path | None = None, say: Say = silent
) -> LinearReport:
    """Raises UserError for sets that do not go together, too few images of a class, and an encoder that is not whole."""
    if settings.draws < 1 or settings.per_class < 1:
        raise UserError(f"--per-class, --draws: expected 1 or more, found {settings.per_class} and {settings.draws}")
    train, test = ImageSet.opened(settings.train), ImageSet.opened(settings.test)
    _require_same_classes(settings, train, test)
    _require_enough(settings, train)
    draws = [few_a_class(train.labels, settings.per_class, settings.seed + n) for n in range(settings.draws)]
    used = np.unique(np.concatenate(draws))
    return LinearReport(
        settings,
        len(train.classes),
        len(test),
        tuple(_score(path, settings, (train, test), (used, draws), cache, say) for path in encoders),
    )


def _score(
    path: Path,
    settings: LinearSettings,
    sets: tuple[ImageSet, ImageSet],
    drawn: tuple[np.ndarray, Sequence[np.ndarray]],
    cache: Path | None,
    say: Say,
) -> EncoderScore:
    (train, test), (used, draws) = sets, drawn
    with opened(path, settings.feature_layer, settings.projected) as encoder:
        train_x = pooled_features(
            encoder, train, used.tolist(), settings.batch, cache, lambda t: say(f"{path}: train, {t}")
        )
        test_x = pooled_features(encoder, test, None, settings.batch, cache, lambda t: say(f"{path}: test, {t}"))
        features = encoder.place.told + (", projected" if settings.projected else "")
    found, means = [], []
    for n, draw in enumerate(draws):
        x, y = train_x[np.searchsorted(used, draw)], train.labels[draw]
        found.append(linear_probe(x, y, test_x, test.labels, seed=settings.seed + n))
        means.append(prototype_accuracy(x, y, test_x, test.labels))
    return EncoderScore(str(path), features, tuple(found), tuple(means))


def _require_same_classes(settings: LinearSettings, train: ImageSet, test: ImageSet) -> None:
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise UserError(
            f"{settings.test}: expected the {len(train.classes)} classes of {settings.train}, found {len(test.classes)}; "
            f"{odd[0]} is in one alone"
        )


def _require_enough(settings: LinearSettings, train: ImageSet) -> None:
    counts = np.bincount(train.labels, minlength=len(train.classes))
    if counts.min() < settings.per_class:
        raise UserError(
            f"{settings.train}: expected {settings.per_class} images of every class, found {counts.min()} of "
            f"{train.classes[int(counts.argmin())]}; set --per-class to as many as there are"
        )
