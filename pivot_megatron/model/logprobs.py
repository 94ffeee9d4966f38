"""Log-probabilities of target tokens, over a vocabulary that is split between tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from pivot_megatron.runtime.distributed import tensor_parallel_coordinates


def target_logprobs(
    hidden: Tensor, to_logits: Callable[[Tensor], Tensor], predictors: Tensor, targets: Tensor
) -> Tensor:
    """`log p(targets[i] | hidden[predictors[i]])`, `[N]` float32, the same on every tensor-parallel rank.

    `hidden` `[T, 1, H]`, whole on every rank; `to_logits` gives this rank's part of the vocabulary, `[N, 1, V / tp]`.
    """
    if targets.numel() == 0:
        # A pack without answers still runs forward and backward on every rank: predict one token, and keep nothing of it.
        return to_logits(hidden[:1]).sum().expand(1)[:0] * 0.0
    losses: Tensor = vocab_parallel_cross_entropy(to_logits(hidden[predictors]), targets[:, None])
    return -losses[:, 0]


def without_padding_rows(logits: Tensor, vocabulary: int) -> Tensor:
    """This rank's logits `[..., padded V / tp]` with no mass on rows past `vocabulary`, which are padding."""
    width = logits.shape[-1]
    first = tensor_parallel_coordinates()[0] * width
    if first + width <= vocabulary:
        return logits
    padding = torch.arange(first, first + width, device=logits.device) >= vocabulary
    return logits.masked_fill(padding, torch.finfo(logits.dtype).min)
