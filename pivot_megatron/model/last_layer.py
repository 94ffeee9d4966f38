"""The head's last layer, past whose attention only tokens that predict an answer's go on."""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, scatter_to_sequence_parallel_region
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from pivot_megatron.model.attention import Segments


class LastLayer(TransformerLayer):  # type: ignore[misc]
    """`[T(/tp), 1, H]` to `[M(/tp), 1, H]`, of the tokens that `Segments.outputs` name. Nothing reads the others' outputs, and of
    a pair with an image those are most of its tokens."""

    def _forward_attention(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        hidden, context = super()._forward_attention(*args, **kwargs)
        segments: Segments = kwargs["packed_seq_params"]
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        hidden = hidden.index_select(0, segments.outputs)
        return (scatter_to_sequence_parallel_region(hidden) if self.config.sequence_parallel else hidden), context
