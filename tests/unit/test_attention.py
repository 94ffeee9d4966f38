"""Every form of attention over segments against one written out in float64."""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pivot_megatron.config.schema import Fp8, Layout, Precision
from pivot_megatron.errors import UserError
from pivot_megatron.families.architecture import EncoderArchitecture, HeadArchitecture
from pivot_megatron.model import specs
from pivot_megatron.runtime import attention, attention_trial, kernels
from pivot_megatron.runtime.attention import Choice, Heads, Spans, build_kernel, choose_kernel
from pivot_megatron.runtime.attention_trial import require_kernel
from pivot_megatron.runtime.engine import engine_fault

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


TE, FLASH, VARLEN = "transformer_engine", "flash_attn", "torch.nn.attention.varlen"


def on_gpu(monkeypatch: pytest.MonkeyPatch, fault: str | None = None, **packages: Any) -> None:
    """`packages`: what there is, by the name without dots; no other kernel is. `fault`: of Transformer Engine. Tensors stay where
    they are."""
    for room in (attention, kernels):
        monkeypatch.setattr(room, "engine_fault", lambda: fault)
    gpu = types.SimpleNamespace(is_cuda=True, device=torch.device("cpu"))
    monkeypatch.setattr(attention, "current_platform", lambda: gpu)
    monkeypatch.setattr(attention_trial, "current_platform", lambda: gpu)
    monkeypatch.setattr(
        kernels, "current_platform", lambda: types.SimpleNamespace(is_cuda=True, transformer_engine=False)
    )
    for module in (TE, FLASH, VARLEN):
        monkeypatch.setitem(sys.modules, module, packages.get(module.rpartition(".")[2]))
    monkeypatch.delitem(sys.modules, f"{TE}.pytorch", raising=False)
    if engine := packages.get(TE):
        monkeypatch.setitem(sys.modules, f"{TE}.pytorch", engine.pytorch)


def package(name: str, **holds: Any) -> types.ModuleType:
    found = types.ModuleType(name)
    vars(found).update(holds)
    return found


def anything(*args: Any, scale: float = 1.0, window_size: tuple[int, int] = (-1, -1), **options: Any) -> Tensor:
    """A kernel that is there, and of no use."""
    raise RuntimeError("no kernel image is available\nfor execution on the device")


ENGINE = package(TE, pytorch=types.SimpleNamespace(DotProductAttention=lambda *args, **options: anything))
FLASH_ATTN = package(FLASH, flash_attn_varlen_func=anything)
TORCH = package(VARLEN, varlen_attn=anything)


def test_which_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_kernel(torch.float32) == choose_kernel(torch.bfloat16) == Choice("sdpa")
    on_gpu(monkeypatch, transformer_engine=ENGINE, flash_attn=FLASH_ATTN, varlen=TORCH)
    assert choose_kernel(torch.bfloat16) == Choice("te") and choose_kernel(torch.float32) == Choice("sdpa")
    on_gpu(monkeypatch, flash_attn=FLASH_ATTN, varlen=TORCH)
    assert choose_kernel(torch.bfloat16) == Choice("flash-attn")
    on_gpu(monkeypatch, varlen=TORCH)
    assert choose_kernel(torch.bfloat16) == Choice("torch-varlen")
    on_gpu(monkeypatch)
    with pytest.raises(UserError, match=r"needs .*torch >= 2.11, found none that loads beside .*; install one of them"):
        choose_kernel(torch.bfloat16)


def test_one_that_does_not_load_is_told_and_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package built for another torch, a folder that has its name alone, a torch that is too old."""
    fault = "te.so: undefined symbol: _ZN3c10"
    on_gpu(monkeypatch, fault, flash_attn=package(FLASH), varlen=TORCH)
    found = choose_kernel(torch.bfloat16)
    assert found.name == "torch-varlen" and list(found.passed_over) == ["te", "flash-attn"]
    assert "undefined symbol" in found.passed_over["te"] and "cannot import name" in found.passed_over["flash-attn"]
    engine, flash = kernels.kernels_in_use(Precision("bf16")).passed_over
    assert engine == "Transformer Engine does not load (te.so: undefined symbol: _ZN3c10)"
    assert flash.startswith("flash-attn's varlen attention does not load (cannot import name 'flash_attn_varlen_func'")
    assert kernels.kernels_in_use(Precision("fp32")).passed_over == (engine,)  # its layers would have been used

    def of_torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None): ...

    on_gpu(monkeypatch, fault, flash_attn=package(FLASH), varlen=package(VARLEN, varlen_attn=of_torch_2_10))
    with pytest.raises(
        UserError, match=r"undefined symbol.*cannot import name.*takes no scale and no window_size, torch 2.11"
    ):
        choose_kernel(torch.bfloat16)


def test_an_engine_that_does_not_load_is_out_of_sight(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """megatron-core imports the package itself, which loads where a part of it does not."""
    for name in [name for name in sys.modules if name.partition(".")[0] == TE]:
        monkeypatch.delitem(sys.modules, name)
    folder = tmp_path / TE
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "pytorch.py").write_text("raise OSError('libcudnn.so.9: cannot open:\\n no such file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert importlib.import_module(TE).__name__ == TE
    monkeypatch.setitem(sys.modules, TE, sys.modules[TE])  # put back what this test leaves behind
    assert engine_fault.__wrapped__() == "libcudnn.so.9: cannot open: no such file"
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(TE)
    assert engine_fault.__wrapped__() is None  # as if it were not installed


KERNELS = {
    "Transformer Engine's packed attention": {TE: ENGINE},
    "flash-attn's varlen attention": {FLASH: FLASH_ATTN},
    "torch's varlen attention": {"varlen": TORCH},
}


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_that_does_not_run_is_told_before_a_run_depends_on_it(name, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = Heads(4, 2, 72, 0.3, causal=True)
    require_kernel(heads, torch.bfloat16)  # a CPU's own needs no trial
    on_gpu(monkeypatch, **KERNELS[name])
    require_kernel(heads, torch.float32)
    with pytest.raises(UserError) as told:
        require_kernel(heads, torch.bfloat16)
    message = str(told.value)
    assert name in message and "causal heads of width 72" in message and "install" in message and "\n" not in message
    assert "no kernel image is available for execution on the device" in message


@pytest.mark.parametrize("causal", [True, False])
def test_a_kernel_with_other_numbers_is_told(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What flash-attn gives with its causal mask from the bottom right, and what it gave from the top left."""
    heads = Heads(4, 2, 24, 0.3, causal)

    def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale, causal):
        return Varlen(Heads(4, 2, 24, softmax_scale, causal))(q, k, v, cu_q, cu_k, max_q, max_k)

    def from_the_top_left(q, k, v, cu_q, cu_k, *rest, **options):
        queries, places = cu_q.diff().tolist(), torch.arange(len(k)).split(cu_k.diff().tolist())
        seen = torch.cat([place[:n] for place, n in zip(places, queries)])
        return flash_attn_varlen_func(q, k[seen], v[seen], cu_q, cu_q, max(queries), max(queries), **options)

    on_gpu(monkeypatch, flash_attn=package(FLASH, flash_attn_varlen_func=flash_attn_varlen_func))
    require_kernel(heads, torch.bfloat16)
    on_gpu(monkeypatch, flash_attn=package(FLASH, flash_attn_varlen_func=from_the_top_left))
    with pytest.raises(UserError, match=r"its results differ from those of torch's own in float32 by \d+%"):
        require_kernel(heads, torch.bfloat16)


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

    on_gpu(monkeypatch, flash_attn=package(FLASH, flash_attn_varlen_func=flash_attn_varlen_func))
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
    on_gpu(monkeypatch, varlen=package(VARLEN, varlen_attn=varlen_attn))
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

    stand_in = types.SimpleNamespace(DotProductAttention=DotProductAttention)
    on_gpu(monkeypatch, transformer_engine=package(TE, pytorch=stand_in))
    same_as_on_cpu(heads, build_kernel(heads, torch.bfloat16))


def same_as_on_cpu(heads: Heads, kernel: attention.Kernel) -> None:
    query, key, value = inputs(LENGTHS_ON_GPU, heads, torch.float64)
    spans = spans_of(LENGTHS_ON_GPU)
    found = kernel(query, key, value, spans)
    assert found.shape == query.shape
    assert torch.allclose(found, written_out(heads, query, key, value, spans))


def test_a_run_tries_its_own_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tensor-parallel rank, the encoder's and the language model's; never in FP8."""
    tried: list[tuple[Heads, torch.dtype]] = []
    monkeypatch.setattr(specs, "require_kernel", lambda heads, dtype: tried.append((heads, dtype)))
    encoder = EncoderArchitecture("siglip", 4, 144, 2, 176, 32, 8, 1e-6, "gelu_tanh", feature_layer=-2)
    head = HeadArchitecture("qwen2", 4, 64, 4, 2, 16, 128, 200, 1e-6, 1e6, True, 1024)
    specs.require_attention(encoder, head, Layout(tensor=2), Precision("bf16", Fp8("tensorwise")))
    assert tried == [
        (Heads(1, 1, 72, 72**-0.5, causal=False), torch.bfloat16),
        (Heads(2, 1, 16, 0.25, causal=True), torch.bfloat16),
    ]
