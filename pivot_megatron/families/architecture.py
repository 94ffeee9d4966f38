"""The numbers that define an encoder or a head, read from a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pivot_megatron.errors import UserError

VOCABULARY_MULTIPLE = 128


@dataclass(frozen=True)
class EncoderArchitecture:
    """A vision transformer. `layers` is the Hugging Face checkpoint's count; sizes in pixels, channels or layers."""

    family: str
    layers: int
    hidden: int
    heads: int
    ffn: int
    image_size: int
    patch_size: int
    norm_epsilon: float
    activation: str

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def grid(self) -> int:
        """Patches a side: a valid convolution drops the pixels past the last whole patch."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
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

    @property
    def padded_vocabulary(self) -> int:
        """Rows of the embedding in megatron-core: the same for every layout, so that checkpoints know none."""
        return -(-self.vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def field_of(config: Mapping[str, Any], key: str, where: str) -> Any:
    """`config[key]`; raises UserError naming the file and key if it is absent."""
    if config.get(key) is None:
        raise UserError(f"{where}: expected the key `{key}`, found none; is this the model's own config.json?")
    return config[key]
