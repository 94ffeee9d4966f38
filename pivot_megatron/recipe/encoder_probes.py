"""Linear probes of several frozen encoders on the same images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pivot_megatron.data_prep.synthetic import SCENE_CLASSES, scene_classes
from pivot_megatron.probe.digits import digits
from pivot_megatron.probe.features import pooled_features
from pivot_megatron.probe.image_set import ImageSet
from pivot_megatron.probe.linear import linear_probe
from pivot_megatron.probe.opening import opened
from pivot_megatron.recipe.demo_scale import DemoScale
from pivot_megatron.recipe.record import ProbeScore

Sets = Mapping[str, tuple[ImageSet, ImageSet]]
"""By name: images to train a probe with, and to test it."""


def labelled_sets(scale: DemoScale) -> Sets:
    """Scenes of one large shape among small ones, and handwritten digits, which nothing here was trained on."""
    drawn = [
        scene_classes(scale.seed + offset, count, scale.image_size)
        for offset, count in ((4, scale.probe_train), (5, scale.probe_test))
    ]
    train, test = (ImageSet.of_bytes(images, np.array(labels), SCENE_CLASSES) for images, labels in drawn)
    return {"scenes": (train, test)} | ({"digits": digits(scale.image_size)} if scale.digits else {})


def probe_scores(name: str, folder: Path, sets: Sets, *, seed: int) -> list[ProbeScore]:
    """One score a set, of the encoder in a Hugging Face `folder`."""
    scores = []
    for dataset, (train, test) in sets.items():
        with opened(folder) as encoder:
            train_x, test_x = pooled_features(encoder, train), pooled_features(encoder, test)
        found = linear_probe(train_x, train.labels, test_x, test.labels, seed=seed)
        scores.append(
            ProbeScore(
                encoder=name,
                dataset=dataset,
                accuracy=found.accuracy,
                low=found.low,
                high=found.high,
                total=found.total,
                c=found.c,
                accuracy_best_c_on_test=found.accuracy_best_c_on_test,
            )
        )
    return scores
