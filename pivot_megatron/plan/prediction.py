"""What a plan says of one layout, in the units that a run measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pivot_megatron.config.schema import Layout

PARTS = ("data", "encoder", "head", "communication", "optimizer")
"""What a step's time is divided into. The projector counts to the encoder; embeddings, logits and loss to the head."""


@dataclass(frozen=True)
class Prediction:
    """Of one step at `layout` with so many data-parallel replicas. `parts`: seconds of the step by `PARTS`, on the stage that
    takes longest; they come to `step_seconds` with the pipeline's `idle_seconds`. `peak_bytes`: a rank's, by pipeline stage."""

    layout: Layout
    data_parallel: int
    step_seconds: float
    parts: Mapping[str, float]
    idle_seconds: float
    peak_bytes: Sequence[int]


def mean_of(predictions: Sequence[Prediction]) -> Prediction:
    """Of several steps at one layout: mean seconds, and the most memory."""
    count, first = len(predictions), predictions[0]
    return replace(
        first,
        step_seconds=sum(one.step_seconds for one in predictions) / count,
        parts={part: sum(one.parts[part] for one in predictions) / count for part in first.parts},
        idle_seconds=sum(one.idle_seconds for one in predictions) / count,
        peak_bytes=[max(peaks) for peaks in zip(*(one.peak_bytes for one in predictions), strict=True)],
    )
