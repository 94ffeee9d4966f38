"""Attention kernels over packed segments: which one this machine has, behind one signature.

A segment's queries attend to its own keys, all of them or causally from the bottom right: the last query sees every key, the
one before it all but the last. All kernels are exact; they differ in speed and in what they run on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pivot_megatron.errors import UserError, in_a_line
from pivot_megatron.runtime.device import current_platform
from pivot_megatron.runtime.engine import engine_fault


@dataclass(frozen=True)
class Heads:
    """What attention of one tensor-parallel rank looks like: `queries` heads over `groups` of keys, each `width` wide."""

    queries: int
    groups: int
    width: int
    scale: float
    causal: bool


@dataclass(frozen=True)
class Rows:
    """Segments as rows of equal length, each at the end of its row, so that all their diagonals meet at the bottom right.

    `queries` `[G, q]`, `keys` `[G, k]`: the token at each place (any token where the row is empty); `places` `[T]`: where each
    query stands in the flattened `[G * q]`; `filled` `[G, k]` bool.
    """

    queries: Tensor
    keys: Tensor
    places: Tensor
    filled: Tensor

    @classmethod
    def of(cls, spans: Spans) -> Rows:
        queries, places = _in_rows(spans.query_ends, spans.longest[0], sum(n for n, _ in spans.lengths))
        keys, _ = _in_rows(spans.key_ends, spans.longest[1], sum(n for _, n in spans.lengths))
        lengths = spans.key_ends.diff()[:, None]
        filled = torch.arange(keys.shape[1], device=keys.device) >= keys.shape[1] - lengths
        return cls(queries, keys, places, filled)

    @cached_property
    def causal_mask(self) -> Tensor:
        return self._mask(causal=True)

    @cached_property
    def full_mask(self) -> Tensor | None:
        return None if self.filled.all() else self._mask(causal=False)

    def _mask(self, causal: bool) -> Tensor:
        """`[G, 1, q, k]` bool. A place that would see nothing sees the last key, so that no softmax is over nothing."""
        queries, keys = self.queries.shape[1], self.keys.shape[1]
        mask = self.filled[:, None, None, :].expand(-1, 1, queries, -1)
        if causal:
            mask = mask & torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril(keys - queries)
        nothing = ~mask.any(-1, keepdim=True)
        return mask | nothing & (torch.arange(keys, device=mask.device) == keys - 1)


def _in_rows(ends: Tensor, longest: int, total: int) -> tuple[Tensor, Tensor]:
    """`[G, longest]` token at each place, and `[total]` place of each token."""
    rows = torch.arange(ends.numel() - 1, device=ends.device)
    last = ends[1:]
    index = (last[:, None] - longest + torch.arange(longest, device=ends.device)).clamp(min=0)
    shift = (rows + 1) * longest - last
    return index, torch.arange(total, device=ends.device) + shift.repeat_interleave(ends.diff(), output_size=total)


@dataclass(frozen=True)
class Spans:
    """`lengths`: (queries, keys) of each of G segments. `query_ends`, `key_ends` `[G + 1]` int32 on the device: the same,
    summed up from 0."""

    lengths: tuple[tuple[int, int], ...] = ()
    query_ends: Tensor = field(default_factory=torch.Tensor)
    key_ends: Tensor = field(default_factory=torch.Tensor)

    @property
    def longest(self) -> tuple[int, int]:
        """The most queries and the most keys of any segment."""
        return max(queries for queries, _ in self.lengths), max(keys for _, keys in self.lengths)

    @cached_property
    def rows(self) -> Rows:
        return Rows.of(self)


Kernel = Callable[[Tensor, Tensor, Tensor, Spans], Tensor]
"""Query `[T, n, d]`, key and value `[K, groups, d]`, segment after segment, to `[T, n, d]`."""

KernelName = Literal["te", "flash-attn", "torch-varlen", "sdpa"]
DESCRIPTIONS: dict[KernelName, str] = {
    "te": "Transformer Engine's packed attention",
    "flash-attn": "flash-attn's varlen attention",
    "torch-varlen": "torch's varlen attention",
    "sdpa": "torch's scaled-dot-product attention, segment by segment",
}

# Short segments are padded to rows and attended in one call: there the calls themselves cost more than the padding.
SHORT = 96

# The first torch whose varlen attention takes a scale and a window.
_VARLEN_SINCE = "2.11"


@dataclass(frozen=True)
class Choice:
    """`passed_over`: faster kernels that are installed and do not load, each with the reason."""

    name: KernelName
    passed_over: Mapping[KernelName, str] = field(default_factory=dict)


def choose_kernel(dtype: torch.dtype) -> Choice:
    """The fastest kernel that this platform has for `dtype`. Raises UserError where a GPU has none."""
    if not current_platform().is_cuda or dtype == torch.float32:  # the fused kernels take 16-bit floats alone
        return Choice("sdpa")
    passed_over: dict[KernelName, str] = {}
    for name, (package, load) in _FUSED.items():
        try:
            load()
        except Exception as error:  # of an import, of a library that cannot be loaded, of a check of its own
            if not isinstance(error, ModuleNotFoundError) or error.name != package:
                passed_over[name] = in_a_line(error)
        else:
            return Choice(name, passed_over)
    reasons = "".join(f"; {DESCRIPTIONS[name]} does not load ({why})" for name, why in passed_over.items())
    raise UserError(
        f"precision.compute: {dtype} attention over packs on a GPU needs transformer-engine, flash-attn or torch >= "
        f"{_VARLEN_SINCE}, found none that loads beside torch {torch.__version__}{reasons}; install one of them, or set "
        "precision.compute: fp32"
    )


def build_kernel(heads: Heads, dtype: torch.dtype) -> Kernel:
    builders: dict[KernelName, Callable[[Heads], Kernel]] = {
        "te": _te,
        "flash-attn": _flash_attn,
        "torch-varlen": _torch_varlen,
        "sdpa": _sdpa,
    }
    return builders[choose_kernel(dtype).name](heads)


def _load_te() -> Any:
    if (why := engine_fault()) is not None:
        raise ImportError(why)
    import transformer_engine  # noqa: F401  (whether there is one)
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention


def _load_flash_attn() -> Any:
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    return flash_attn_varlen_func


def _load_torch_varlen() -> Any:
    from torch.nn.attention.varlen import varlen_attn

    if missing := {"scale", "window_size"} - set(signature(varlen_attn).parameters):
        raise ImportError(
            f"torch {torch.__version__}'s takes no {' and no '.join(sorted(missing))}, torch {_VARLEN_SINCE}'s does"
        )
    return varlen_attn


# By preference; a package that is not there at all is nothing to tell of.
_FUSED: dict[KernelName, tuple[str, Callable[[], Any]]] = {
    "te": ("transformer_engine", _load_te),
    "flash-attn": ("flash_attn", _load_flash_attn),
    "torch-varlen": ("torch.nn.attention.varlen", _load_torch_varlen),
}


def _te(heads: Heads) -> Kernel:
    mask = "padding_causal_bottom_right" if heads.causal else "padding"
    # Not a child of any module: it holds no weights, and its state would be a checkpoint key that the CPU does not have.
    attention: Any = _load_te()(
        heads.queries,
        heads.width,
        num_gqa_groups=heads.groups,
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type=mask,
        softmax_scale=heads.scale,
    )

    def kernel(query: Tensor, key: Tensor, value: Tensor, spans: Spans) -> Tensor:
        queries, keys = spans.longest
        out: Tensor = attention(
            query,
            key,
            value,
            qkv_format="thd",
            attn_mask_type=mask,
            cu_seqlens_q=spans.query_ends,
            cu_seqlens_kv=spans.key_ends,
            max_seqlen_q=queries,
            max_seqlen_kv=keys,
        )
        return out.view_as(query)

    return kernel


def _flash_attn(heads: Heads) -> Kernel:
    # It is causal from the bottom right.
    return _varlen(_load_flash_attn(), softmax_scale=heads.scale, causal=heads.causal)


def _torch_varlen(heads: Heads) -> Kernel:
    varlen_attn = _load_torch_varlen()
    # Its first releases repeat keys over their queries by themselves, later ones where they are told to.
    grouped = heads.queries != heads.groups and "enable_gqa" in signature(varlen_attn).parameters
    options = {"enable_gqa": True} if grouped else {}
    window = (-1, 0) if heads.causal else (-1, -1)  # no keys past the diagonal from the bottom right
    return _varlen(varlen_attn, scale=heads.scale, window_size=window, **options)


def _varlen(attend: Callable[..., Any], **options: Any) -> Kernel:
    """The order of arguments that flash-attn began and torch took over."""

    def kernel(query: Tensor, key: Tensor, value: Tensor, spans: Spans) -> Tensor:
        out: Tensor = attend(query, key, value, spans.query_ends, spans.key_ends, *spans.longest, **options)
        return out

    return kernel


def _sdpa(heads: Heads) -> Kernel:
    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """`[rows, heads, length, width]` each."""
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None and heads.causal,
            scale=heads.scale,
            enable_gqa=heads.queries != heads.groups,
        )

    def in_rows(query: Tensor, key: Tensor, value: Tensor, spans: Spans) -> Tensor:
        rows = spans.rows
        q, k, v = (
            x.index_select(0, index.flatten()).view(*index.shape, *x.shape[1:]).transpose(1, 2)
            for x, index in ((query, rows.queries), (key, rows.keys), (value, rows.keys))
        )
        out = attend(q, k, v, rows.causal_mask if heads.causal else rows.full_mask)
        return out.transpose(1, 2).flatten(0, 1).index_select(0, rows.places)

    def one_by_one(query: Tensor, key: Tensor, value: Tensor, spans: Spans) -> Tensor:
        queries, keys = zip(*spans.lengths, strict=True)
        out = []
        for parts in zip(query.split(queries), key.split(keys), value.split(keys), strict=True):
            q, k, v = (x.transpose(0, 1)[None] for x in parts)
            out.append(attend(q, k, v, _corner_mask(q, k) if heads.causal else None)[0].transpose(0, 1))
        return torch.cat(out)

    def kernel(query: Tensor, key: Tensor, value: Tensor, spans: Spans) -> Tensor:
        return (in_rows if spans.longest[1] <= SHORT else one_by_one)(query, key, value, spans)

    return kernel


def _corner_mask(query: Tensor, key: Tensor) -> Tensor | None:
    """`[queries, keys]` bool, causal from the bottom right; None where that is torch's own, which is from the top left."""
    queries, keys = query.shape[2], key.shape[2]
    if queries == keys:
        return None
    return torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
