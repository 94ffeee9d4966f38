"""What the demo asks of its encoders and models: the probes of `pivot probe`, at the demo's size, by the demo's names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from pivot_megatron.data_prep.synthetic import MASK_CLASSES
from pivot_megatron.probe.classes import LinearReport, LinearSettings, probe_encoders
from pivot_megatron.probe.gradcam import gradcam_models
from pivot_megatron.probe.gradcam_report import GradcamReport, GradcamSettings
from pivot_megatron.probe.segment import SegmentationReport, SegmentationSettings, segment_encoders
from pivot_megatron.probe.table import Score
from pivot_megatron.recipe.demo_folder import MODELS, Demo
from pivot_megatron.recipe.demo_report import INIT

_STEPS = 5  # of overfitting to a pair, where `pivot probe gradcam` makes 20: most of what the demo's gradients take


def label_sets(demo: Demo) -> list[str]:
    """Images of classes that encoders are probed on, by the name of their folder."""
    return ["scenes", "digits"] if demo.scale.digits else ["scenes"]


def probe_labels(demo: Demo, name: str) -> LinearReport:
    """Raises UserError as `probe_encoders` does; so do the others as theirs."""
    scale, encoders = demo.scale, _encoders(demo)
    sets = demo.data(name)
    settings = LinearSettings(sets / "train", sets / "test", scale.per_class, scale.draws, scale.seed)
    found = probe_encoders(list(encoders.values()), settings, _cache(demo))
    return replace(found, scores=_named(found.scores, encoders))


def probe_masks(demo: Demo) -> SegmentationReport:
    scale, encoders = demo.scale, _encoders(demo)
    sets = demo.data("masks")
    settings = SegmentationSettings(
        sets / "train", sets / "test", len(MASK_CLASSES), seeds=scale.heads, seed=scale.seed
    )
    found = segment_encoders(list(encoders.values()), settings, _cache(demo))
    return replace(found, scores=_named(found.scores, encoders))


def probe_gradients(demo: Demo) -> GradcamReport:
    """Of the first held-out pairs, by the runs' own models."""
    settings = GradcamSettings(demo.data("held_out"), demo.scale.gradients, steps=_STEPS)
    found = gradcam_models([demo.run(name) for name in MODELS.values()], settings, demo.out / "gradcam")
    columns = [replace(one, label=name) for one, name in zip(found.columns, MODELS, strict=True)]
    return replace(found, columns=columns)


def _encoders(demo: Demo) -> dict[str, Path]:
    """As every model that is compared has it, and as all began."""
    return {**{model: demo.export(model, "encoder") for model in MODELS}, INIT: demo.encoder}


def _named(scores: Iterable[Score], names: Mapping[str, Path]) -> tuple[Score, ...]:
    return tuple(replace(score, encoder=name) for score, name in zip(scores, names, strict=True))


def _cache(demo: Demo) -> Path:
    return demo.out / "features"
