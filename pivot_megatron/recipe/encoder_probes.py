"""Linear probes of several frozen encoders on the same images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pivot_megatron.data_prep.synthetic import scene_classes
from pivot_megatron.probe.linear import LabelledImages, digits_images, linear_probe, patch_features
from pivot_megatron.recipe.demo_scale import DemoScale
from pivot_megatron.recipe.record import ProbeScore


@dataclass(frozen=True)
class ProbedEncoder:
    """A Hugging Face folder, and the index of the hidden state that PIVOT trains there."""

    folder: Path
    hidden_state: int


def labelled_sets(scale: DemoScale) -> dict[str, LabelledImages]:
    """Scenes of one large shape among small ones, and handwritten digits, which nothing here was trained on."""
    train = scene_classes(scale.seed + 4, scale.probe_train, scale.image_size)
    test = scene_classes(scale.seed + 5, scale.probe_test, scale.image_size)
    scenes = LabelledImages(tuple(train[0]), np.array(train[1]), tuple(test[0]), np.array(test[1]))
    return {"scenes": scenes} | ({"digits": digits_images(scale.image_size)} if scale.digits else {})


def probe_scores(
    name: str, encoder: ProbedEncoder, sets: Mapping[str, LabelledImages], *, seed: int
) -> list[ProbeScore]:
    """One score a set."""
    scores = []
    for dataset, images in sets.items():
        train, test = (
            patch_features(encoder.folder, files, hidden_state=encoder.hidden_state)
            for files in (images.train_images, images.test_images)
        )
        found = linear_probe(train, images.train_labels, test, images.test_labels, seed=seed)
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
