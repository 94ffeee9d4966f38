"""Which checkpoints stay: a function of what lies in a run's folder and of its config, and of nothing else."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from pivot_megatron.checkpoints.folder import Saved, remove, saved_of, steps_in
from pivot_megatron.config.schema import Checkpoints, KeepBest
from pivot_megatron.errors import UserError


def staying(saved: Sequence[Saved], policy: Checkpoints) -> dict[int, list[str]]:
    """The steps of those that stay, oldest first, each with why: the newest `keep`, those due at multiples of `keep_every`, and
    the best.

    What is gone for one reason was gone for all, so that pruning after every save leaves what pruning once at the end would.
    """
    ordered = sorted(saved, key=lambda s: s.step)
    why: dict[int, list[str]] = {s.step: [] for s in ordered}
    for found in ordered[-max(policy.keep, 1) :]:
        why[found.step].append("newest")
    for found in ordered:
        if policy.keep_every is not None and found.due % policy.keep_every == 0:
            why[found.step].append(f"every {policy.keep_every}")
    for found in _best(ordered, policy.keep_best) if policy.keep_best else ():
        why[found.step].append("best")
    return {step: reasons for step, reasons in why.items() if reasons}


def _best(ordered: Sequence[Saved], wanted: KeepBest) -> Sequence[Saved]:
    """Of equals the later. A checkpoint without the metric, or with one that is no number, is never among them."""
    known = [s for s in ordered if math.isfinite(s.metrics.get(wanted.metric, math.nan))]
    sign = 1.0 if wanted.largest else -1.0
    return sorted(known, key=lambda s: (sign * s.metrics[wanted.metric], s.step), reverse=True)[: wanted.count]


def superfluous(folder: Path, policy: Checkpoints) -> list[Path]:
    """Checkpoints in `folder` that do not stay, oldest first. One without `saved.json` is no run's, and stays, as does one whose
    `saved.json` is damaged."""
    found = [(saved, path) for _, path in steps_in(folder) if (saved := _readable(path)) is not None]
    stay = staying([saved for saved, _ in found], policy)
    return [path for saved, path in found if saved.step not in stay]


def _readable(checkpoint: Path) -> Saved | None:
    """None of an import, and of one that cannot be judged, which is said."""
    try:
        return saved_of(checkpoint)
    except UserError as error:
        print(f"{error} its checkpoint is left alone", file=sys.stderr, flush=True)
        return None


def prune(folder: Path, policy: Checkpoints) -> list[Path]:
    """Remove them; returns which they were."""
    gone = superfluous(folder, policy)
    for path in gone:
        remove(path)
    return gone
