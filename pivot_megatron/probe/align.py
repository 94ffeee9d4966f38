"""The alignment of several encoders with one language model on the same images and captions, and how they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pivot_megatron.errors import UserError
from pivot_megatron.probe.alignment import Alignment, best_alignment
from pivot_megatron.probe.captions import CaptionSet
from pivot_megatron.probe.features import Say, layer_features, silent
from pivot_megatron.probe.language_model import require_language_model, text_features
from pivot_megatron.probe.opening import opened, require_sources
from pivot_megatron.probe.table import Score, as_json, as_table, figures


@dataclass(frozen=True)
class AlignmentSettings:
    """`neighbours`: of each sample, the k of the measure."""

    llm: Path
    captions: Path
    count: int = 1024
    neighbours: int = 10
    batch: int = 64
    feature_layer: int | None = None


@dataclass(frozen=True)
class AlignmentReport:
    """`scores`: the mutual neighbours of each sample."""

    settings: AlignmentSettings
    scores: tuple[Score, ...]

    @property
    def chance(self) -> float:
        """Mutual neighbours of two layers that have nothing in common; the best of many pairs of layers comes to more."""
        return self.settings.neighbours / (self.settings.count - 1)

    def as_json(self, **facts: Any) -> str:
        return as_json(self.settings, self.scores, chance=self.chance, **facts)

    def figures(self) -> dict[str, float]:
        return figures("mutual neighbours", self.scores)

    def as_text(self) -> str:
        return f"{as_table('mutual', self.scores)}\nchance, of one pair of layers: {100 * self.chance:.2f}"


def alignment_score(encoder: str, found: Alignment) -> Score:
    """Layers are told counted from 1."""
    layers, cka_layers = ([one + 1 for one in pair] for pair in (found.layers, found.cka_layers))
    return Score(
        encoder,
        np.array([found.overlaps]),
        {"layers": _pair(layers), "CKA": f"{found.cka:.3f}", "CKA's layers": _pair(cka_layers)},
        {"layers": layers, "cka": found.cka, "cka_layers": cka_layers},
    )


def _pair(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def align_encoders(
    encoders: Sequence[Path], settings: AlignmentSettings, cache: Path | None = None, say: Say = silent
) -> AlignmentReport:
    """Raises UserError for captions that are too few or empty, too many neighbours, and models that are not whole."""
    if settings.batch < 1 or not 0 < settings.neighbours < settings.count:
        raise UserError(
            f"--batch, --neighbours, --count: expected 1 or more, and fewer neighbours than images, found {settings.batch}, "
            f"{settings.neighbours} and {settings.count}"
        )
    require_sources(encoders)
    require_language_model(settings.llm)
    pairs = CaptionSet.opened(settings.captions, settings.count)
    texts = text_features(
        settings.llm, pairs.captions, settings.batch, cache, lambda told: say(f"{settings.llm}: {told}")
    )
    scores = []
    for path in encoders:
        with opened(path, settings.feature_layer) as encoder:
            seen = layer_features(encoder, pairs, settings.batch, cache, lambda told: say(f"{path}: {told}"))  # noqa: B023
        scores.append(alignment_score(str(path), best_alignment(list(seen), list(texts), settings.neighbours)))
    return AlignmentReport(settings, tuple(scores))
