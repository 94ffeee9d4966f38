"""Floating-point operations of a DPO step, counted from sizes and lengths.

Matrix products alone, two operations a multiply-add; attention over whole rows, also where a mask hides half, as the kernels
of both trainers compute it on CPU. A backward pass takes twice its forward, but for the patch embedding, whose input needs
no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from pivot_megatron.data.build import PACK_MULTIPLE
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
    """What goes through the model. `squares`: sum over attention rows of their length squared. `scored`: tokens with logits."""

    images: int
    tokens: int
    squares: int
    scored: int


def forward(arch: Architecture, work: Work) -> Flops:
    encoder, head = arch.encoder, arch.head
    patch_values = 3 * encoder.patch_size**2
    image_tokens = work.images * encoder.tokens
    encoder_layer = image_tokens * (8 * encoder.hidden**2 + 4 * encoder.hidden * encoder.ffn)
    encoder_attention = work.images * 4 * encoder.tokens**2 * encoder.hidden
    width, kv_width = head.heads * head.head_dim, head.groups * head.head_dim
    head_layer = 2 * head.hidden * (2 * width + 2 * kv_width) + 6 * head.hidden * head.ffn
    return Flops(
        patches=2 * image_tokens * patch_values * encoder.hidden,
        encoder=arch.encoder_layers * (encoder_layer + encoder_attention),
        projector=2 * image_tokens * (encoder.hidden + head.hidden) * head.hidden,
        layers=work.tokens * head.layers * head_layer,
        attention=work.squares * head.layers * 4 * width,
        logits=2 * work.scored * head.hidden * head.vocabulary,
    )


def backward(forwards: Flops) -> Flops:
    return Flops(forwards.patches, *(2 * part for part in astuple(forwards)[1:]))


def pivot_work(pairs: Sequence[PairLengths]) -> Work:
    """Ours: a pack in which each pair's prefix stands once; logits at answers."""
    tokens = sum(pair.shared for pair in pairs)
    longest = max(pair.shared for pair in pairs)
    return Work(
        images=len(pairs),
        tokens=tokens + -tokens % PACK_MULTIPLE,
        squares=len(pairs) * longest**2,
        scored=sum(pair.scored for pair in pairs),
    )


def trl_work(pairs: Sequence[PairLengths], on_gpu: bool) -> Work:
    """TRL's: every answer behind a prefix and an image of its own, padded to the longest. Its output layer picks the answers
    where Triton runs; elsewhere it scores every position."""
    longest = max(pair.prefix + max(pair.chosen, pair.rejected) for pair in pairs)
    rows = 2 * len(pairs)
    return Work(
        images=rows,
        tokens=rows * longest,
        squares=rows * longest**2,
        scored=sum(pair.scored for pair in pairs) if on_gpu else rows * (longest - 1),
    )


def step(arch: Architecture, work: Work, logits_again: bool) -> Flops:
    """Policy forward and backward, and the frozen reference's forward. `logits_again`: the backward makes them anew instead
    of keeping them."""
    forwards = forward(arch, work)
    again = Flops(logits=forwards.logits) if logits_again else Flops()
    return forwards + backward(forwards) + again + forwards


def pivot_step(arch: Architecture, pairs: Sequence[PairLengths]) -> Flops:
    return step(arch, pivot_work(pairs), logits_again=False)


def trl_step(arch: Architecture, pairs: Sequence[PairLengths], on_gpu: bool) -> Flops:
    return step(arch, trl_work(pairs, on_gpu), logits_again=True)
