"""Every form of attention over segments against one written out in float64."""

from __future__ import annotations

import inspect
import sys
import types
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pivot_megatron.errors import UserError
from pivot_megatron.runtime import attention
from pivot_megatron.runtime.attention import Heads, Spans, build_kernel, kernel_name
from pivot_megatron.runtime.device import Platform

Lengths = list[tuple[int, int]]
LENGTHS = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 12)), min_size=1, max_size=5).map(
    lambda drawn: [(queries, queries + more) for queries, more in drawn]
)


def ends(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def spans_of(lengths: Lengths) -> Spans:
    return Spans(tuple(lengths), ends([q for q, _ in lengths]), ends([k for _, k in lengths]))


def written_out(heads: Heads, query: Tensor, key: Tensor, value: Tensor, spans: Spans) -> Tensor:
    """Segment by segment, head by head, softmax of scores."""
    out, q_at, k_at = [], 0, 0
    for queries, keys in spans.lengths:
        rows = []
        for head in range(heads.queries):
            group = head * heads.groups // heads.queries
            q, k, v = (
                query[q_at : q_at + queries, head],
                key[k_at : k_at + keys, group],
                value[k_at : k_at + keys, group],
            )
            scores = heads.scale * q @ k.T
            if heads.causal:
                seen = torch.arange(keys)[None] <= torch.arange(queries)[:, None] + keys - queries
                scores = scores.masked_fill(~seen, -torch.inf)
            rows.append(scores.softmax(-1) @ v)
        out.append(torch.stack(rows, 1))
        q_at, k_at = q_at + queries, k_at + keys
    return torch.cat(out)


def inputs(lengths: Lengths, heads: Heads, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    total, keys = sum(q for q, _ in lengths), sum(k for _, k in lengths)
    shapes = [(total, heads.queries), (keys, heads.groups), (keys, heads.groups)]
    return [torch.randn(*shape, heads.width, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("short", [0, 10_000], ids=["one-by-one", "rows"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
@settings(max_examples=15, deadline=None)
@given(lengths=LENGTHS)
def test_forms_on_cpu(short: int, groups: int, causal: bool, lengths: Lengths) -> None:
    heads = Heads(4, groups, 8, 0.3, causal)
    given_ = inputs(lengths, heads)
    weights = torch.randn(sum(q for q, _ in lengths), 4, 8, generator=torch.Generator().manual_seed(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "SHORT", short)
        found = build_kernel(heads, torch.float32)(*given_, spans_of(lengths))
    slopes = torch.autograd.grad((found * weights).sum(), given_)
    exact = [x.detach().double().requires_grad_() for x in given_]
    expected = written_out(heads, *exact, spans_of(lengths))
    wanted = torch.autograd.grad((expected * weights.double()).sum(), exact)
    # float32's rounding over at most 21 keys and 8 channels; measured at most 2e-6.
    for ours, theirs in zip((found, *slopes), (expected, *wanted)):
        assert (ours.double() - theirs).abs().max() <= 1e-5


def on_gpu(monkeypatch: pytest.MonkeyPatch, transformer_engine: bool, modules: tuple[str, ...]) -> None:
    platform = Platform(torch.device("cuda", 0), "nccl", transformer_engine, logits_tile_bytes=1)
    monkeypatch.setattr(attention, "current_platform", lambda: platform)
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: object() if name in modules else None)


def test_which_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel_name(torch.float32) == kernel_name(torch.bfloat16) == "sdpa"
    on_gpu(monkeypatch, True, ("flash_attn", "torch.nn.attention.varlen"))
    assert kernel_name(torch.bfloat16) == "te" and kernel_name(torch.float32) == "sdpa"
    on_gpu(monkeypatch, False, ("flash_attn", "torch.nn.attention.varlen"))
    assert kernel_name(torch.bfloat16) == "flash-attn"
    on_gpu(monkeypatch, False, ("torch.nn.attention.varlen",))
    assert kernel_name(torch.bfloat16) == "torch-varlen"
    on_gpu(monkeypatch, False, ())
    with pytest.raises(UserError, match="install one of them"):
        kernel_name(torch.bfloat16)


LENGTHS_ON_GPU: Lengths = [(5, 5), (2, 6), (4, 4), (3, 7)]


class Varlen:
    """Stands for a fused kernel that needs a GPU: takes what the real one takes, checks it, and computes it plainly."""

    def __init__(self, heads: Heads) -> None:
        self.heads = heads

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
        assert cu_q.dtype == cu_k.dtype == torch.int32
        spans = Spans(tuple(zip(cu_q.diff().tolist(), cu_k.diff().tolist())), cu_q, cu_k)
        assert spans.longest == (max_q, max_k)
        return written_out(self.heads, q, k, v, spans)


@pytest.mark.parametrize("causal", [True, False])
def test_flash_attn_is_asked_as_it_wants(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    heads = Heads(4, 2, 8, 0.3, causal)

    def flash_attn_varlen_func(  # the parameters of flash-attn 2.8 that are used
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
    ):
        assert softmax_scale == heads.scale and causal == heads.causal and not dropout_p
        return Varlen(heads)(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)

    module = types.SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    on_gpu(monkeypatch, False, ("flash_attn",))
    same_as_on_cpu(heads, build_kernel(heads, torch.bfloat16))


@pytest.mark.parametrize("causal", [True, False])
def test_torch_varlen_is_asked_as_it_wants(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    heads = Heads(4, 2, 8, 0.3, causal)
    real = inspect.signature(varlen.varlen_attn)

    def varlen_attn(*args, **options):
        bound = real.bind(*args, **options).arguments
        assert bound["scale"] == heads.scale and tuple(bound["window_size"]) == ((-1, 0) if causal else (-1, -1))
        assert bound.get("enable_gqa", "enable_gqa" not in real.parameters)
        return Varlen(heads)(*args)

    varlen_attn.__signature__ = real
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    on_gpu(monkeypatch, False, ("torch.nn.attention.varlen",))
    same_as_on_cpu(heads, build_kernel(heads, torch.bfloat16))


@pytest.mark.parametrize("causal", [True, False])
def test_transformer_engine_is_asked_as_it_wants(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    heads = Heads(4, 2, 8, 0.3, causal)

    class DotProductAttention:  # the parameters of transformer-engine 2.20 that are used
        def __init__(
            self,
            num_attention_heads,
            kv_channels,
            num_gqa_groups,
            attention_dropout,
            qkv_format,
            attn_mask_type,
            softmax_scale,
        ):
            assert (num_attention_heads, kv_channels, num_gqa_groups, attention_dropout) == (4, 8, 2, 0.0)
            assert softmax_scale == heads.scale

        def __call__(
            self, q, k, v, qkv_format, attn_mask_type, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv
        ):
            assert qkv_format == "thd"
            assert attn_mask_type == ("padding_causal_bottom_right" if causal else "padding")
            out = Varlen(heads)(q, k, v, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv)
            return out.flatten(1)  # `[T, heads * width]`

    package = types.ModuleType("transformer_engine")
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    monkeypatch.setitem(
        sys.modules, "transformer_engine.pytorch", types.SimpleNamespace(DotProductAttention=DotProductAttention)
    )
    on_gpu(monkeypatch, True, ())
    same_as_on_cpu(heads, build_kernel(heads, torch.bfloat16))


def same_as_on_cpu(heads: Heads, kernel: attention.Kernel) -> None:
    query, key, value = inputs(LENGTHS_ON_GPU, heads, torch.float64)
    spans = spans_of(LENGTHS_ON_GPU)
    found = kernel(query, key, value, spans)
    assert found.shape == query.shape
    assert torch.allclose(found, written_out(heads, query, key, value, spans))
