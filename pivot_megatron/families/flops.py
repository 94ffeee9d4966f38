"""Floating-point operations by count, two a multiply-add, of the matrix products that nearly all time goes into.

Norms, activations, rotary embeddings and softmaxes are left out: a few per cent of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence

from pivot_megatron.families.architecture import EncoderArchitecture, HeadArchitecture


def encoder_flops(arch: EncoderArchitecture, layers: int, tokens: int | None = None) -> float:
    """One sequence's forward pass through patch embedding and `layers` layers; `tokens`: its patches, a square's if left out."""
    tokens = arch.tokens if tokens is None else tokens
    places = tokens + int(arch.class_token)
    weights = 4 * arch.hidden**2 + (3 if arch.gated else 2) * arch.hidden * arch.ffn
    attention = 2 * places * arch.hidden  # scores and weighted sums, of every token with every other
    patches = 3 * arch.patch_size**2 * arch.hidden
    return 2.0 * (tokens * patches + places * layers * (weights + attention))


def projector_flops(encoder: EncoderArchitecture, head: HeadArchitecture) -> float:
    """One image's forward pass through the projector's two linears."""
    return 2.0 * encoder.tokens * head.hidden * (encoder.hidden + head.hidden)


def head_weights(arch: HeadArchitecture) -> int:
    """Weights of one layer that every token is multiplied with."""
    return arch.hidden * arch.head_dim * (2 * arch.heads + 2 * arch.groups) + head_mlp_weights(arch)


def head_mlp_weights(arch: HeadArchitecture) -> int:
    """Those of its MLP."""
    return 3 * arch.hidden * arch.ffn


def head_flops(arch: HeadArchitecture, segments: Sequence[tuple[int, int]], answers: int) -> float:
    """Forward pass over causal segments of (queries, keys) tokens, with logits, and the last layer's MLP, at `answers` places.

    A segment's last query sees all its keys, the one before all but one, and so on.
    """
    tokens = sum(queries for queries, _ in segments)
    seen = sum(queries * (keys - (queries - 1) / 2) for queries, keys in segments)
    layers = arch.layers * (tokens * head_weights(arch) + 2 * seen * arch.heads * arch.head_dim)
    layers -= (tokens - answers) * head_mlp_weights(arch)
    return 2.0 * (layers + answers * arch.hidden * arch.vocabulary)
