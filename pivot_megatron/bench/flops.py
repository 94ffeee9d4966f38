"""Floating-point operations of a DPO step, counted from sizes and lengths.

Matrix products alone, two operations a multiply-add; every query with every key of its segment, also where a causal mask
hides half. A backward pass takes twice its forward, but for the patch embedding, whose input needs no gradient. Both trainers
make the logits anew in the backward pass instead of keeping them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from pivot_megatron.data.build import PACK_MULTIPLE
from pivot_megatron.families.flops import encoder_flops, head_mlp_weights, head_weights, projector_flops
from pivot_megatron.model.composition import Architecture


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


@dataclass(frozen=True)
class Flops:
    """`layers`: the head's linear layers; `attention`: the head's scores and sums over values."""

    patches: float = 0.0
    encoder: float = 0.0
    projector: float = 0.0
    layers: float = 0.0
    attention: float = 0.0
    logits: float = 0.0

    @property
    def total(self) -> float:
        return float(sum(astuple(self)))

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def scaled(self, factor: float) -> Flops:
        return Flops(*(factor * part for part in astuple(self)))


@dataclass(frozen=True)
class Work:
    """What goes through the model. `scores`: queries times keys, summed over attention's segments. `scored`: tokens with
    logits. `last`: tokens that go through the last layer's MLP."""

    images: int
    tokens: int
    scores: int
    scored: int
    last: int


def forward(arch: Architecture, work: Work) -> Flops:
    encoder, head = arch.encoder, arch.head
    patches = encoder_flops(encoder, layers=0)
    return Flops(
        patches=work.images * patches,
        encoder=work.images * (encoder_flops(encoder, arch.encoder_layers) - patches),
        projector=work.images * projector_flops(encoder, head),
        layers=2.0
        * (work.tokens * head.layers * head_weights(head) - (work.tokens - work.last) * head_mlp_weights(head)),
        attention=4.0 * work.scores * head.layers * head.heads * head.head_dim,
        logits=2.0 * work.scored * head.hidden * head.vocabulary,
    )


def backward(forwards: Flops) -> Flops:
    return Flops(forwards.patches, *(2 * part for part in astuple(forwards)[1:]))


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
