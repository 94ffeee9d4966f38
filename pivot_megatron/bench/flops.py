"""Floating-point operations of a DPO step by either trainer, counted from the lengths of its pairs as `model/flops.py` counts.

Both trainers make the logits anew in the backward pass instead of keeping them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pivot_megatron.data.build import PACK_MULTIPLE
from pivot_megatron.model.composition import Architecture
from pivot_megatron.model.flops import Flops, Work, backward, forward


@dataclass(frozen=True)
class PairLengths:
    """Tokens: image and prompt, and each answer as far as its last token with loss. `scored`: tokens with loss."""

    prefix: int
    chosen: int
    rejected: int
    scored: int

    @property
    def separate(self) -> int:
        """Of both answers, each behind a prefix of its own."""
        return 2 * self.prefix + self.chosen + self.rejected

    @property
    def shared(self) -> int:
        return self.prefix + self.chosen + self.rejected


def pivot_work(pairs: Sequence[PairLengths]) -> Work:
    """Ours: a pack in which each pair's prefix stands once, read by both answers; logits and the last MLP at answers."""
    tokens = sum(pair.shared for pair in pairs)
    padding = -tokens % PACK_MULTIPLE
    scored = sum(pair.scored for pair in pairs)
    first = sum((pair.prefix + pair.chosen) ** 2 for pair in pairs)
    second = sum(pair.rejected * (pair.prefix + pair.rejected) for pair in pairs)
    return Work(
        images=len(pairs),
        tokens=tokens + padding,
        scores=first + second + padding**2,
        scored=scored,
        last=scored,
    )


def trl_work(pairs: Sequence[PairLengths], on_gpu: bool) -> Work:
    """TRL's: every answer behind a prefix and an image of its own, padded to the longest. Its output layer picks the answers
    where Triton runs; elsewhere it scores every position."""
    longest = max(pair.prefix + max(pair.chosen, pair.rejected) for pair in pairs)
    rows = 2 * len(pairs)
    return Work(
        images=rows,
        tokens=rows * longest,
        scores=rows * longest**2,
        scored=sum(pair.scored for pair in pairs) if on_gpu else rows * (longest - 1),
        last=rows * longest,
    )


def step(arch: Architecture, work: Work, epochs: int = 1) -> Flops:
    """Policy forward and backward, and the frozen reference's forward, once in so many `epochs`."""
    forwards = forward(arch, work)
    return forwards + backward(forwards) + Flops(logits=forwards.logits) + forwards.scaled(1 / epochs)
