"""Floating-point operations that a model's training takes by count, whatever computes it.

Matrix products alone, two operations a multiply-add; every query with every key of its segment, also where a causal mask
hides half (Chowdhery et al. 2022, appendix B). Nothing that is computed again, no padding, no reference model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

from pivot_megatron.config.schema import ParameterRule
from pivot_megatron.data.batch import PackedBatch
from pivot_megatron.families.flops import encoder_flops, head_mlp_weights, head_weights, projector_flops
from pivot_megatron.model.composition import Architecture
from pivot_megatron.model.freeze import rate_of


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
    scores: float
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


@dataclass(frozen=True)
class Trained:
    """Which parts have parameters that train."""

    encoder: bool = True
    projector: bool = True
    llm: bool = True

    @classmethod
    def by(cls, names: Iterable[str], rules: Sequence[ParameterRule]) -> Trained:
        """`names`: of all of a model's parameters."""
        parts = {name.split(".", 1)[0] for name in names if rate_of(name, rules) != "frozen"}
        return cls("encoder" in parts, "projector" in parts, "llm" in parts)


_ALL = Trained()


def backward(forwards: Flops, trained: Trained = _ALL) -> Flops:
    """As much as the forward pass for gradients of inputs, where anything in the part or before it trains, and as much again for
    those of weights, where the part itself does. The patch embedding's input needs none. Attention has no weights: both of its
    factors are inputs."""
    before = trained.encoder or trained.projector
    reaching = float(before or trained.llm)
    head = reaching + trained.llm
    return Flops(
        patches=trained.encoder * forwards.patches,
        encoder=2 * trained.encoder * forwards.encoder,
        projector=(before + trained.projector) * forwards.projector,
        layers=head * forwards.layers,
        attention=2 * reaching * forwards.attention,
        logits=head * forwards.logits,
    )


def pack_flops(arch: Architecture, batch: PackedBatch) -> Flops:
    """One forward pass over what stands in a pack. `batch` may be on any pipeline stage: views and segments are on all."""
    images = [rows * columns for view in batch.views for rows, columns in view.grids]
    segments = batch.segments[: len(batch.segments) - bool(batch.padding)]
    answers = batch.predictors.numel()
    work = Work(0, batch.length, sum(queries * keys for queries, keys in segments), answers, answers)
    return image_flops(arch, images) + forward(arch, work)


def image_flops(arch: Architecture, sequences: Sequence[int]) -> Flops:
    """One forward pass of images, or tiles, of so many patches each through encoder and projector."""
    encoder = arch.encoder
    patches = sum(encoder_flops(encoder, 0, tokens) for tokens in sequences)
    layers = sum(encoder_flops(encoder, arch.encoder_layers, tokens) for tokens in sequences) - patches
    return Flops(patches, layers, projector_flops(encoder, arch.head) * sum(sequences) / encoder.tokens)


@dataclass(frozen=True)
class TrainingFlops:
    """Counts forward and backward passes."""

    arch: Architecture
    trained: Trained

    def of(self, batches: Iterable[PackedBatch]) -> float:
        forwards = sum((pack_flops(self.arch, batch) for batch in batches), Flops())
        return (forwards + backward(forwards, self.trained)).total


@dataclass(frozen=True)
class SampleWork:
    """Estimated work of samples' forward and backward passes, by which micro-batches are balanced. Without what a causal mask
    hides, as kernels leave it out too: a segment's last query sees all its keys, the one before all but one."""

    arch: Architecture
    trained: Trained = _ALL

    def images(self, sequences: Sequence[int]) -> float:
        """Of images, or tiles, of so many patches each."""
        return self._both(image_flops(self.arch, sequences))

    def text(self, segments: Sequence[tuple[int, int]], answers: int) -> float:
        """Of segments of (queries, keys) tokens, image places among them, with logits at `answers` places."""
        tokens = sum(queries for queries, _ in segments)
        seen = sum(queries * (keys - (queries - 1) / 2) for queries, keys in segments)
        return self._both(forward(self.arch, Work(0, tokens, seen, answers, answers)))

    def _both(self, forwards: Flops) -> float:
        return (forwards + backward(forwards, self.trained)).total
