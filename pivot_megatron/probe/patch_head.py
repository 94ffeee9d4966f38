"""A small network that reads from a patch's features which classes are in it, and how well it does."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from pivot_megatron.probe import multilabel
from pivot_megatron.probe.features import Say, silent
from pivot_megatron.probe.kept import Arrays, kept_together, made_by
from pivot_megatron.probe.multilabel import Counts
from pivot_megatron.probe.patch_set import PatchSet
from pivot_megatron.runtime.device import current_platform

HIDDEN = 1024
IMAGES_A_STEP = 32
PEAK, FLOOR = 1e-3, 1e-4
WARM_UP = 500
WEIGHT_DECAY = 0.01
"""The paper's (arXiv 2510.16333)."""
_COUNTS = tuple(field.name for field in fields(Counts))


@dataclass(frozen=True)
class TrainedHead:
    """`epochs`: what it says of the test set after each. `head`: `[..., width]` to logits `[..., classes]`, as it was after the
    epoch number `best` (from 0), the first of the highest macro recall."""

    head: nn.Module
    epochs: tuple[Counts, ...]
    best: int


def learning_rate(step: int, steps: int) -> float:
    """Of step 0 to `steps` - 1: linear up to `PEAK`, then a half cosine down to `FLOOR` at the last. The warm-up takes `WARM_UP`
    steps, and a fifth of all at most."""
    warm_up = min(WARM_UP, steps // 5)
    if step < warm_up:
        return PEAK * (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - 1 - warm_up)
    return FLOOR + (PEAK - FLOOR) * (1 + math.cos(math.pi * done)) / 2


def new_head(width: int, classes: int, seed: int) -> nn.Sequential:
    """By torch's own initialisation with `seed`, on the device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Sequential(nn.Linear(width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, classes))
    return head.to(current_platform().device)


def train_head(train: PatchSet, test: PatchSet, epochs: int, seed: int, say: Say = silent) -> TrainedHead:
    """By AdamW on the mean binary cross-entropy over patches and classes. `seed` draws the first weights and images' orders."""
    head = new_head(train.width, train.classes, seed)
    optimizer = torch.optim.AdamW(head.parameters(), lr=PEAK, weight_decay=WEIGHT_DECAY)
    draw = torch.Generator().manual_seed(seed)
    steps_an_epoch = -(-len(train) // IMAGES_A_STEP)
    found: list[Counts] = []
    best, kept_head, highest = 0, head, -1.0
    for epoch in range(epochs):
        for n, images in enumerate(torch.randperm(len(train), generator=draw).split(IMAGES_A_STEP)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(epoch * steps_an_epoch + n, epochs * steps_an_epoch)
            features, there = train.of(images.tolist())
            optimizer.zero_grad()
            loss: Tensor = binary_cross_entropy_with_logits(head(features), there.float())
            loss.backward()
            optimizer.step()
        found.append(judged(head, test))
        recall = float(found[-1].recall[found[-1].present].mean())
        say(f"epoch {epoch + 1} of {epochs}, macro recall {recall:.4f}")
        if recall > highest:
            best, kept_head, highest = epoch, copy.deepcopy(head), recall
    return TrainedHead(kept_head, tuple(found), best)


def kept_head(
    train: PatchSet, test: PatchSet, epochs: int, seed: int, cache: Path | None, say: Say = silent
) -> TrainedHead:
    """As `train_head`, which trains where the folder `cache` has none that it would train alike."""

    def work() -> Arrays:
        found = train_head(train, test, epochs, seed, say)
        weights = parameters_to_vector(found.head.parameters()).detach().cpu().numpy()
        counts = np.array([[getattr(one, name) for name in _COUNTS] for one in found.epochs])
        return {"weights": weights, "counts": counts, "best": np.array(found.best)}

    made = made_by(__file__, multilabel.__file__, "torch")
    told = f"head {made} {train.fingerprint} {test.fingerprint} {epochs} {seed}"
    stored = kept_together(work, cache, told)
    head = new_head(train.width, train.classes, seed)
    vector_to_parameters(torch.from_numpy(stored["weights"]).to(current_platform().device), head.parameters())
    return TrainedHead(head, tuple(Counts(*one) for one in stored["counts"]), int(stored["best"]))


@torch.no_grad()
def judged(head: nn.Module, test: PatchSet) -> Counts:
    """A class is said to be in a patch where its sigmoid is above 0.5."""
    parts = []
    for images in torch.arange(len(test)).split(IMAGES_A_STEP):
        features, there = test.of(images.tolist())
        parts.append(Counts.of(there, head(features) > 0))
    return sum(parts[1:], parts[0])
