"""The model and data sizes that benches run at, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pivot_megatron.errors import UserError


@dataclass(frozen=True)
class Shape:
    """An encoder, a head and pairs. Images are square, sizes in pixels; `words` bounds an answer's length, both included.

    `encoder_layers` counts the last one too, which a model that reads features before it leaves out.
    """

    name: str
    image_size: int
    patch_size: int
    encoder_hidden: int
    encoder_layers: int
    encoder_heads: int
    encoder_ffn: int
    head_hidden: int
    head_layers: int
    head_heads: int
    head_kv_heads: int
    head_ffn: int
    vocabulary: int
    words: tuple[int, int]
    pairs_a_step: int
    samples: int

    @property
    def image_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2


# Half of the work is in the output layer: Qwen2.5's vocabulary over a small body.
_VOCABULARY = Shape(
    name="vocabulary",
    image_size=384,
    patch_size=16,
    encoder_hidden=384,
    encoder_layers=6,
    encoder_heads=6,
    encoder_ffn=1536,
    head_hidden=512,
    head_layers=8,
    head_heads=8,
    head_kv_heads=2,
    head_ffn=1408,
    vocabulary=151_936,
    words=(30, 90),
    pairs_a_step=2,
    samples=24,
)

# Most of it is in the head's layers, as with heads of several billion parameters.
_BODY = replace(
    _VOCABULARY,
    name="body",
    head_hidden=1024,
    head_layers=12,
    head_heads=16,
    head_kv_heads=4,
    head_ffn=2816,
    vocabulary=8192,
)

# SigLIP2-So400m/16 at 384 pixels under Qwen2.5's true heads, for a GPU.
_SO400M_SMALL = replace(
    _VOCABULARY,
    name="so400m_0.5b",
    encoder_hidden=1152,
    encoder_layers=27,
    encoder_heads=16,
    encoder_ffn=4304,
    head_hidden=896,
    head_layers=24,
    head_heads=14,
    head_ffn=4864,
    pairs_a_step=8,
    samples=64,
)

_SO400M_LARGE = replace(
    _SO400M_SMALL,
    name="so400m_1.5b",
    head_hidden=1536,
    head_layers=28,
    head_heads=12,
    head_ffn=8960,
)

# Seconds to make and run; says nothing about speed.
_TINY = Shape(
    name="tiny",
    image_size=48,
    patch_size=16,
    encoder_hidden=32,
    encoder_layers=3,
    encoder_heads=4,
    encoder_ffn=48,
    head_hidden=32,
    head_layers=2,
    head_heads=4,
    head_kv_heads=2,
    head_ffn=64,
    vocabulary=576,
    words=(3, 9),
    pairs_a_step=2,
    samples=12,
)

SHAPES = {shape.name: shape for shape in (_VOCABULARY, _BODY, _SO400M_SMALL, _SO400M_LARGE, _TINY)}


def shape_by_name(name: str) -> Shape:
    if name not in SHAPES:
        raise UserError(f"--shape: expected one of {', '.join(SHAPES)}, found {name}")
    return SHAPES[name]
