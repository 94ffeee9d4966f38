"""The vocabulary's two ends: word embeddings in, log-probs of target tokens out.

Both are megatron-core's modules with another forward. Of 152 thousand rows a step touches a few hundred on the way in, and all
of them on the way out: so gradients are added straight to the data-parallel gradient buffer, and neither a dense gradient of the
embedding nor anything of shape `[tokens, vocabulary]` ever stands in memory whole.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, VocabParallelEmbedding
from torch import Tensor

from pivot_megatron.runtime.device import current_platform

_TOKENS = 4096  # of which logits are computed at once, a slice of the vocabulary after another


class WordEmbeddings(VocabParallelEmbedding):
    """`[...]` token ids to `[..., hidden]`, whole on every tensor-parallel rank."""

    def forward(self, input_: Tensor) -> Tensor:
        local = input_ - self.vocab_start_index
        elsewhere = (local < 0) | (local >= self.weight.shape[0])
        out = _Lookup.apply(self.weight, local.masked_fill(elsewhere, 0), elsewhere)
        whole: Tensor = reduce_from_tensor_model_parallel_region(out, group=self.tp_group)
        return whole


class TargetLogprobs(ColumnParallelLinear):
    """The output layer, which gives log-probs of given tokens and no logits."""

    def forward(self, hidden: Tensor, targets: Tensor, vocabulary: int, weight: Tensor | None = None) -> Tensor:
        """`log p(targets[i] | hidden[i])`, `[N]` float32, the same on every tensor-parallel rank.

        `hidden` `[N, H]`, whole on every rank; rows of the weight past `vocabulary` are padding and have no mass.
        """
        weight = self.weight if weight is None else weight
        first = self.tp_group.rank() * weight.shape[0]
        rows = min(max(vocabulary - first, 0), weight.shape[0])
        out: Tensor = _TargetLogprobs.apply(hidden, weight, targets - first, rows, self.tp_group)
        return out


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, elsewhere: Tensor) -> Tensor:
        ctx.save_for_backward(ids, elsewhere)
        ctx.weight = weight
        return weight[ids].masked_fill_(elsewhere[..., None], 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        ids, elsewhere = ctx.saved_tensors
        target = _Gradient(ctx.weight)
        kept = gradient.masked_fill(elsewhere[..., None], 0.0).flatten(0, -2)
        target.buffer.index_add_(0, ids.flatten(), kept.to(target.buffer.dtype))
        return target.for_autograd(), None, None


class _TargetLogprobs(torch.autograd.Function):
    """`targets` count from this rank's first row and may lie outside; only the first `rows` rows of `weight` are words."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int, group: Any) -> Tensor:
        total = hidden.new_full((hidden.shape[0],), -torch.inf, dtype=torch.float32)
        target = torch.zeros_like(total)
        for at, tile in _tiles(hidden, rows):
            logits = _product(hidden[at], weight[tile].t())
            inside, column = _column(targets[at], tile)
            target[at] += logits.gather(1, column)[:, 0].masked_fill_(~inside, 0.0)
            peak = logits.amax(1)
            total[at] = torch.logaddexp(total[at], logits.sub_(peak[:, None]).exp_().sum(1).log_().add_(peak))
        if group.size() > 1:
            parts = total.new_empty(group.size(), 2, total.numel())
            dist.all_gather_into_tensor(parts, torch.stack([total, target])[None], group=group)
            total, target = parts[:, 0].logsumexp(0), parts[:, 1].sum(0)
        ctx.save_for_backward(hidden, targets, total)
        ctx.weight, ctx.rows, ctx.group = weight, rows, group
        return target - total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, targets, total = ctx.saved_tensors
        weight: Tensor = ctx.weight
        towards_hidden = torch.zeros_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        target = _Gradient(weight) if ctx.needs_input_grad[1] else None
        for at, tile in _tiles(hidden, ctx.rows):
            # d log p / d logits: one at the target, less the probabilities.
            slope = _product(hidden[at], weight[tile].t()).sub_(total[at][:, None]).exp_().mul_(-gradient[at][:, None])
            inside, column = _column(targets[at], tile)
            slope.scatter_add_(1, column, gradient[at].masked_fill(~inside, 0.0)[:, None])
            slope = slope.to(hidden.dtype)
            if towards_hidden is not None:
                _add_product(towards_hidden[at], slope, weight[tile])
            if target is not None:
                _add_product(target.buffer[tile], slope.t(), hidden[at])
        if towards_hidden is not None:
            if ctx.group.size() > 1:
                dist.all_reduce(towards_hidden, group=ctx.group)
            towards_hidden = towards_hidden.to(hidden.dtype)
        return towards_hidden, target.for_autograd() if target else None, None, None, None


class _Gradient:
    """Where a weight's gradient is added up: the data-parallel buffer, or a tensor of its own where there is none."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        main: Tensor | None = getattr(weight, "main_grad", None)
        self._direct = main is not None
        self.buffer = torch.zeros_like(weight, dtype=torch.float32) if main is None else main

    def for_autograd(self) -> Tensor | None:
        """What a backward function gives for the weight."""
        if not self._direct:
            return self.buffer.to(self._weight.dtype)
        weight: Any = self._weight
        weight.grad_added_to_main_grad, weight.zero_out_wgrad = True, False
        if getattr(weight, "gradient_must_appear", False):
            # An overlapping reduction waits for a gradient to appear, of which nothing is read: one entry stands for all.
            # Autograd would copy it out whole, and once more where both ends share the weight, so it is told of none.
            weight.grad = weight.new_empty(1).expand_as(weight)
        return None


def tile_shape(tokens: int, width: int, element_size: int, tile_bytes: int) -> tuple[int, int]:
    """(tokens, vocabulary rows) of which logits are computed at once, out of `tokens` hidden states `width` wide: in float32
    they take `tile_bytes`, and so does a slice of the weight's gradient, which products of 16-bit floats make beside them."""
    tokens = max(1, min(_TOKENS, tokens))
    return tokens, max(1, tile_bytes // (4 * (tokens if element_size == 4 else max(tokens, width))))


def _tiles(hidden: Tensor, rows: int) -> list[tuple[slice, slice]]:
    """Tokens by vocabulary rows."""
    tile_bytes = current_platform().logits_tile_bytes
    tokens, width = tile_shape(hidden.shape[0], hidden.shape[1], hidden.element_size(), tile_bytes)
    return [
        (slice(at, at + tokens), slice(first, min(first + width, rows)))
        for at in range(0, hidden.shape[0], tokens)
        for first in range(0, rows, width)
    ]


def _column(targets: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
    """Whether each target lies in the tile, and its column there `[N, 1]`, 0 where it does not."""
    column = targets - tile.start
    inside = (column >= 0) & (column < tile.stop - tile.start)
    return inside, column.masked_fill(~inside, 0)[:, None]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in float32: 16-bit inputs, but no 16-bit result, whose rounding would add up over tiles."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        out: Tensor = torch.mm(a, b, out_dtype=torch.float32)
        return out
    return a.float() @ b.float()


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b` in float32, in place."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        total.add_(_product(a, b))
