"""The numbers that define an encoder or a head, read from a Hugging Face `config.json`."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from pivot_megatron.errors import UserError

VOCABULARY_MULTIPLE = 128
# Widths that FP8 products and every tensor-parallel size up to 8 divide by: So400m's 4304 is 16 x 269.
FFN_MULTIPLE = 128


@dataclass(frozen=True)
class EncoderArchitecture:
    """A vision transformer of pre-norm layers. `layers` is the checkpoint's count; sizes in pixels, channels or layers.

    `activation` is `swiglu` where the MLP is gated. `class_token`: one stands before the patches, and has a position.
    `pre_norm`: embeddings are normed before the first layer. `final_norm`: features are the last layer's output, normed, if
    they are taken there. `layer_scale`: each residual branch has a scale a channel. `fixed_positions`: position embeddings
    are not learned. `native`: images keep their aspect ratio: patches are given in place of pixels, and positions, those of a
    square of `image_size`, are scaled to each image. `feature_layer`: where features are taken unless a run says otherwise, as
    an index into hidden_states from the end.
    """

    family: str
    layers: int
    hidden: int
    heads: int
    ffn: int
    image_size: int
    patch_size: int
    norm_epsilon: float
    activation: str
    feature_layer: int
    class_token: bool = False
    pre_norm: bool = False
    final_norm: bool = False
    patch_bias: bool = True
    qkv_bias: bool = True
    layer_scale: bool = False
    fixed_positions: bool = False
    native: bool = False

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def gated(self) -> bool:
        return self.activation == "swiglu"

    @property
    def padded_ffn(self) -> int:
        """Width of the MLP in megatron-core, the same for every layout. Zero rows give zeros and get no gradient."""
        return -(-self.ffn // FFN_MULTIPLE) * FFN_MULTIPLE

    @property
    def places(self) -> int:
        """Positions that the encoder has: its class token's and the patches'."""
        return self.tokens + int(self.class_token)

    @property
    def grid(self) -> int:
        """Patches a side: a valid convolution drops the pixels past the last whole patch."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Patches of a square image, which is what the language model sees of it."""
        return self.grid**2


@dataclass(frozen=True)
class HeadArchitecture:
    """A decoder-only language model with grouped-query attention."""

    family: str
    layers: int
    hidden: int
    heads: int
    groups: int
    head_dim: int
    ffn: int
    vocabulary: int
    norm_epsilon: float
    rope_theta: float
    tied_embeddings: bool
    max_positions: int
    qkv_bias: bool = True
    qk_norm: bool = False  # queries and keys are normed, head by head

    @property
    def padded_vocabulary(self) -> int:
        """Rows of the embedding in megatron-core: the same for every layout, so that checkpoints know none."""
        return -(-self.vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def require_sound(arch: EncoderArchitecture | HeadArchitecture, where: str) -> None:
    """Raises UserError naming the file and the first number that no model can have."""
    for field in fields(arch):
        value = getattr(arch, field.name)
        counted = field.type == "int" and field.name != "feature_layer"
        if counted and (type(value) is not int or value < 1):
            raise UserError(f"{where}: {field.name}: expected a whole number above 0, found {value!r}")
        if field.type == "float" and not (is_number(value) and value > 0):
            raise UserError(f"{where}: {field.name}: expected a number above 0, found {value!r}")
    uneven = {"heads": arch.hidden} if isinstance(arch, EncoderArchitecture) else {"groups": arch.heads}
    for name, whole in uneven.items():
        if whole % getattr(arch, name):
            raise UserError(f"{where}: {name}: expected a divisor of {whole}, found {getattr(arch, name)}")


def is_number(value: Any) -> bool:
    """JSON as Python reads it has NaN and Infinity, and True is an int."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def differences(expected: Any, found: Any, but: Collection[str] = ()) -> str:
    """In which fields two architectures differ, those in `but` left out; empty if in none."""
    told = []
    for field in fields(expected):
        wanted, other = getattr(expected, field.name), getattr(found, field.name)
        if field.name in but or wanted == other:
            continue
        if is_dataclass(wanted) and type(wanted) is type(other):
            told += [f"{field.name}.{part}" for part in differences(wanted, other).split("; ")]
        else:
            told.append(f"{field.name} {wanted}, found {other}")
    return "; ".join(told)


def ratio_of(config: Mapping[str, Any], key: str, default: float, where: str) -> float:
    """`config[key]`; raises UserError naming the file and key if it is no number above 0."""
    value = config.get(key, default)
    if not (is_number(value) and value > 0):
        raise UserError(f"{where}: {key}: expected a number above 0, found {value!r}")
    return float(value)


def field_of(config: Mapping[str, Any], key: str, where: str) -> Any:
    """`config[key]`; raises UserError naming the file and key if it is absent."""
    if config.get(key) is None:
        raise UserError(f"{where}: expected the key `{key}`, found none; is this the model's own config.json?")
    return config[key]
