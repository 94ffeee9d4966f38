"""Log-probabilities of target tokens, over a vocabulary that is split between tensor-parallel ranks."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    vocab_parallel_cross_entropy,
)
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from pivot_megatron.runtime.distributed import tensor_parallel_coordinates


def target_logprobs(
    hidden: Tensor, weight: Tensor, predictors: Tensor, targets: Tensor, vocabulary: int, config: TransformerConfig
) -> Tensor:
    """`log p(targets[i] | hidden[predictors[i]])`, `[N]` float32, the same on every tensor-parallel rank.

    `hidden` `[T(/tp), 1, H]`; `weight` `[padded vocabulary / tp, H]`; rows past `vocabulary` are padding and get no mass.
    """
    if config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
    if targets.numel() == 0:  # a pack without answers: keep the graph, so that every rank runs the same backward
        return hidden.sum(dim=(1, 2)).float()[:0] + 0.0 * (hidden.sum() + weight.sum()).float()
    logits = vocabulary_logits(hidden[predictors], weight, vocabulary, config)
    losses: Tensor = vocab_parallel_cross_entropy(logits, targets[:, None])
    return -losses[:, 0]


def vocabulary_logits(hidden: Tensor, weight: Tensor, vocabulary: int, config: TransformerConfig) -> Tensor:
    """`[N, 1, H]` to this rank's float32 logits `[N, 1, padded vocabulary / tp]`, -inf at padding rows."""
    logits: Tensor = linear_with_grad_accumulation_and_async_allreduce(
        hidden,
        weight,
        bias=None,
        gradient_accumulation_fusion=False,
        allreduce_dgrad=config.tensor_model_parallel_size > 1,
        sequence_parallel=False,
    ).float()
    first = tensor_parallel_coordinates()[0] * weight.shape[0]
    if first + weight.shape[0] > vocabulary:
        padding = torch.arange(first, first + weight.shape[0], device=logits.device) >= vocabulary
        logits = logits.masked_fill(padding, torch.finfo(torch.float32).min)
    return logits
