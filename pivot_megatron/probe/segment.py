"""The segmentation probe of several encoders on the same images and seeds, and how they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from pivot_megatron.errors import UserError
from pivot_megatron.probe.features import Say, silent
from pivot_megatron.probe.label_maps import LabelMap, side_by_side
from pivot_megatron.probe.masked import MaskedImages
from pivot_megatron.probe.opening import opened, require_sources
from pivot_megatron.probe.patch_files import patch_sets
from pivot_megatron.probe.patch_head import TrainedHead, kept_head
from pivot_megatron.probe.patch_set import PatchSet
from pivot_megatron.probe.table import Score, as_json, as_table, figures
from pivot_megatron.report.facts import short_names

_PICTURED = 6
_MEASURES = ("recall", "precision", "f1")

Classes = npt.NDArray[np.intp]


@dataclass(frozen=True)
class SegmentationSettings:
    """`classes`: values of masks, from 0 on. `seeds`: heads that are trained, with seeds from `seed` on. `batch`: images that
    pass the encoder at once."""

    train: Path
    test: Path
    classes: int = 151
    epochs: int = 5
    seeds: int = 6
    seed: int = 777
    feature_layer: int | None = None
    batch: int = 64


@dataclass(frozen=True)
class SegmentationReport:
    """`classes`: those that test patches of every encoder show. `unseen`: those of them that not every encoder's training
    patches do. `scores`: of each of `classes`, by seed, the recall at the best epoch. `picture`: a few test images, their
    masks, and what each encoder's first head makes of them."""

    settings: SegmentationSettings
    train_images: int
    test_images: int
    classes: tuple[int, ...]
    unseen: tuple[int, ...]
    scores: tuple[Score, ...]
    picture: Image.Image = field(repr=False)

    def as_json(self, **facts: Any) -> str:
        facts |= {"train_images": self.train_images, "test_images": self.test_images}
        return as_json(self.settings, self.scores, **facts, classes=self.classes, unseen=self.unseen)

    def figures(self) -> dict[str, float]:
        return figures("macro recall", self.scores)

    def as_text(self) -> str:
        return as_table("macro recall", self.scores)


@dataclass(frozen=True)
class _Probed:
    """One encoder. `heads`: by seed. `trained`: classes that are in its patches of training images. `maps`: of pictured images,
    by the first head."""

    name: str
    features: str
    heads: tuple[TrainedHead, ...]
    trained: Classes
    maps: tuple[LabelMap, ...]

    @property
    def tested(self) -> Classes:
        return self.heads[0].epochs[0].present


def segmentation_score(encoder: str, features: str, heads: Sequence[TrainedHead], classes: Classes) -> Score:
    """Of one encoder, by seed. `classes`: those that means are over."""
    best, last = [head.epochs[head.best] for head in heads], [head.epochs[-1] for head in heads]
    told = {
        "last epoch": [counts.recall[classes].mean() for counts in last],
        "precision": [counts.precision[classes].mean() for counts in best],
        "F1": [counts.f1[classes].mean() for counts in best],
    }
    return Score(
        encoder,
        np.stack([counts.recall[classes] for counts in best]),
        {name: f"{100 * np.mean(values):.2f}" for name, values in told.items()},
        {"features": features, "seeds": [_record(head, classes) for head in heads]},
    )


def _record(head: TrainedHead, classes: Classes) -> dict[str, Any]:
    """Epochs are told counted from 1."""
    found = head.epochs[head.best]
    return {
        "best_epoch": head.best + 1,
        "epochs": [
            {name: float(getattr(counts, name)[classes].mean()) for name in _MEASURES} for counts in head.epochs
        ],
        **{name: getattr(found, name)[classes].tolist() for name in _MEASURES},
    }


def segment_encoders(
    encoders: Sequence[Path], settings: SegmentationSettings, cache: Path | None = None, say: Say = silent
) -> SegmentationReport:
    """Raises UserError for images and masks that do not go together, classes that are none, and an encoder that is not whole."""
    if min(settings.epochs, settings.seeds, settings.batch) < 1 or settings.classes < 2:
        raise UserError(
            f"--epochs, --seeds, --batch, --classes: expected 1 or more, and 2 or more classes, found {settings.epochs}, "
            f"{settings.seeds}, {settings.batch} and {settings.classes}"
        )
    require_sources(encoders)
    train, test = MaskedImages.opened(settings.train), MaskedImages.opened(settings.test)
    if both := set(train.names) & set(test.names):
        raise UserError(
            f"--train, --test: expected images that are in one alone, found {len(both)} in both (first: {min(both)})"
        )
    pictured = np.unique(np.linspace(0, len(test) - 1, _PICTURED).astype(int)).tolist()
    found = [_probed(path, settings, (train, test), pictured, cache, partial(_said, say, path)) for path in encoders]
    # Encoders that leave out what is past the last whole patch may miss a class that others see.
    classes, trained = (
        reduce(np.intersect1d, some) for some in ([one.tested for one in found], [one.trained for one in found])
    )
    return SegmentationReport(
        settings,
        len(train),
        len(test),
        tuple(classes.tolist()),
        tuple(np.setdiff1d(classes, trained).tolist()),
        tuple(segmentation_score(one.name, one.features, one.heads, classes) for one in found),
        side_by_side(
            [(test.read(n), test.read_mask(n)) for n in pictured],
            [one.maps for one in found],
            short_names([one.name for one in found]),
            settings.classes,
        ),
    )


def _probed(
    path: Path,
    settings: SegmentationSettings,
    sets: tuple[MaskedImages, MaskedImages],
    pictured: Sequence[int],
    cache: Path | None,
    say: Say,
) -> _Probed:
    named = list(zip(("train", "test"), sets, strict=True))
    with opened(path, settings.feature_layer) as encoder:
        train, test = patch_sets(encoder, named, settings.classes, settings.batch, cache, say)
    if len(test.present) < 2:
        raise UserError(f"{settings.test}: expected masks of 2 classes or more, found {len(test.present)}")
    heads = []
    for n in range(settings.seeds):
        told = partial(_said, say, f"head {n + 1} of {settings.seeds}")
        heads.append(kept_head(train, test, settings.epochs, settings.seed + n, cache, told))
    maps = tuple(_label_map(heads[0], test, n) for n in pictured)
    return _Probed(str(path), encoder.place.told, tuple(heads), train.present, maps)


def _said(say: Say, what: object, told: str) -> None:
    say(f"{what}: {told}")


@torch.no_grad()
def _label_map(head: TrainedHead, test: PatchSet, image: int) -> LabelMap:
    features, _ = test.of([image])
    labels = shown_classes(head.head(features)).reshape(test.grids[image])
    return LabelMap(labels.cpu().numpy(), test.covered[image])


def shown_classes(logits: Tensor) -> Tensor:
    """`[patches]`: of logits `[patches, classes]` the likeliest class past 0, or 0, which is no class of its own and in most
    patches, where a head says that and none of the others."""
    likeliest, label = logits[:, 1:].max(dim=-1)
    return torch.where((logits[:, 0] > 0) & (likeliest <= 0), 0, label + 1)
