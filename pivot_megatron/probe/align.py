"""The alignment of several encoders with one language model on the same images and captions, and how they differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from pivot_megatron.probe.alignment import Alignment, best_alignment
from pivot_megatron.probe.captions import CaptionSet
from pivot_megatron.probe.encoder import opened
from pivot_megatron.probe.features import Say, layer_features, silent
from pivot_megatron.probe.interval import Interval, change_text, mean_interval
from pivot_megatron.probe.language_model import text_features


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
    """`scores`: by encoder, in the order asked for."""

    settings: AlignmentSettings
    scores: tuple[tuple[str, Alignment], ...]

    @property
    def chance(self) -> float:
        """Mutual neighbours of two models that have nothing in common."""
        return self.settings.neighbours / (self.settings.count - 1)

    def differences(self) -> list[tuple[float, Interval]]:
        """Of each encoder after the first from the first, in mutual neighbours, sample by sample."""
        (_, first), *others = self.scores
        paired = [[b - a for a, b in zip(first.overlaps, one.overlaps, strict=True)] for _, one in others]
        return [(sum(pairs) / len(pairs), mean_interval(pairs)) for pairs in paired]

    def as_json(self) -> str:
        scores = [
            {
                "encoder": name,
                "mutual_neighbours": found.mutual,
                "interval": asdict(mean_interval(found.overlaps)),
                "layers": found.layers,
                "cka": found.cka,
                "cka_layers": found.cka_layers,
            }
            for name, found in self.scores
        ]
        against = [
            {"encoder": name, "difference": mean, "interval": asdict(interval)}
            for (name, _), (mean, interval) in zip(self.scores[1:], self.differences(), strict=True)
        ]
        told = {
            "settings": asdict(self.settings),
            "chance": self.chance,
            "scores": scores,
            "against_the_first": against,
        }
        return json.dumps(told, indent=2, default=str)

    def as_text(self) -> str:
        """A line an encoder; mutual neighbours in per cent."""
        width = max(len("encoder"), *(len(name) for name, _ in self.scores))
        lines = [f"{'encoder':<{width}}  mutual   95 % interval   layers     CKA  layers  against the first"]
        changes = ["", *(change_text(mean, interval) for mean, interval in self.differences())]
        for (name, found), change in zip(self.scores, changes, strict=True):
            interval = mean_interval(found.overlaps)
            lines.append(
                f"{name:<{width}}  {100 * found.mutual:6.2f}  {100 * interval.low:6.2f} - {100 * interval.high:6.2f}  "
                f"{_pair(found.layers):>7}  {found.cka:6.3f}  {_pair(found.cka_layers):>6}  {change}".rstrip()
            )
        return "\n".join([*lines, f"{'chance':<{width}}  {100 * self.chance:6.2f}"])


def _say_of(path: Path, say: Say, text: str) -> None:
    say(f"{path}: {text}")


def _pair(layers: tuple[int, int]) -> str:
    """Counted from 1, the encoder's first."""
    return f"{layers[0] + 1}, {layers[1] + 1}"


def align_encoders(
    encoders: Sequence[Path], settings: AlignmentSettings, cache: Path | None = None, say: Say = silent
) -> AlignmentReport:
    """Raises UserError for captions that are too few or empty, too many neighbours, and models that are not whole."""
    pairs = CaptionSet.opened(settings.captions, settings.count)
    texts = text_features(settings.llm, pairs.captions, settings.batch, cache, partial(_say_of, settings.llm, say))
    scores = []
    for path in encoders:
        with opened(path, settings.feature_layer) as encoder:
            seen = layer_features(encoder, pairs, settings.batch, cache, partial(_say_of, path, say))
        scores.append((str(path), best_alignment(list(seen), list(texts), settings.neighbours)))
    return AlignmentReport(settings, tuple(scores))
