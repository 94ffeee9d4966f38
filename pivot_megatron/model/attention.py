"""Core attention over packed segments: branches that share a prefix, and images that see only themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import pad

from pivot_megatron.data.batch import PackedBatch
from pivot_megatron.model.rotary import Rotation
from pivot_megatron.runtime.attention import Heads, Spans, build_kernel


@dataclass
class Segments(PackedSeqParams):
    """Packed-sequence parameters that carry which queries attend to which keys.

    Queries are the tokens, segment after segment; `key_index` `[K]` picks each segment's keys, None where they are its queries.
    `outputs` `[M]`: the tokens whose hidden states are wanted past the last layer, None where there is no such choice.
    """

    spans: Spans = field(default_factory=Spans)
    key_index: Tensor | None = None
    rotation: Rotation | None = None
    outputs: Tensor | None = None


def answer_segments(batch: PackedBatch, rotation: Rotation, multiple: int) -> Segments:
    """Every branch with its prefix, as PackedBatch lays them out, turned to each token's own position. The wanted tokens are
    the predictors, filled up to a multiple of `multiple` with the first token."""
    wanted = batch.predictors.numel()
    return Segments(
        qkv_format="thd",
        spans=Spans(batch.segments, batch.query_ends, batch.key_ends),
        key_index=batch.key_index,
        rotation=rotation,
        outputs=pad(batch.predictors, (0, max(1, -(-wanted // multiple)) * multiple - wanted)),
    )


def image_segments(lengths: Sequence[int], tokens: int, device: torch.device) -> Segments:
    """A segment of each of `lengths`, then padding up to `tokens`."""
    padding = tokens - sum(lengths)
    lengths = [*lengths, *([padding] if padding else [])]
    ends = torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
    return Segments(qkv_format="thd", spans=Spans(tuple((n, n) for n in lengths), ends, ends))


def heads_of(config: TransformerConfig, causal: bool, scale: float | None = None) -> Heads:
    """Of one tensor-parallel rank. `scale` of the scores, where it is not the usual one."""
    tensor = config.tensor_model_parallel_size
    return Heads(
        queries=config.num_attention_heads // tensor,
        groups=max(1, (config.num_query_groups or config.num_attention_heads) // tensor),
        width=config.kv_channels,
        scale=scale or config.kv_channels**-0.5,
        causal=causal,
    )


class SegmentAttention(MegatronModule):
    """A core attention for megatron-core's SelfAttention. Query `[T, n, d]`, key and value `[T, groups, d]`.

    What branches share is computed once, up to here: each one's keys and values are the prefix's and its own, so every
    branch is an ordinary segment of a varlen kernel, and the prefix's gradients add up where they were gathered from.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        attention_type: str = "self",
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        heads = heads_of(config, attn_mask_type == AttnMaskType.causal, softmax_scale)
        self._kernel = build_kernel(heads, config.params_dtype)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Segments | None = None,
        **_: Any,
    ) -> Tensor:
        """`[T, n * d]`."""
        if not isinstance(packed_seq_params, Segments):
            raise TypeError(f"SegmentAttention needs Segments, got {type(packed_seq_params).__name__}")
        if (rotation := packed_seq_params.rotation) is not None:
            query, key = rotation(query), rotation(key)
        if (picked := packed_seq_params.key_index) is not None:
            # index_select: its backward adds rows up in a third less time than that of key[picked].
            key, value = key.index_select(0, picked), value.index_select(0, picked)
        return self._kernel(query, key, value, packed_seq_params.spans).flatten(1)
