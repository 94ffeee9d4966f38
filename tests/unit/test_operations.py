"""Operations that keep less for the backward pass than torch's own: the same numbers as torch's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import embedding, rms_norm, silu
from torch.profiler import ProfilerActivity, profile

import pivot_megatron.runtime  # noqa: F401  (before megatron.core)
from pivot_megatron.model import vocabulary
from pivot_megatron.model.rotary import Rotation
from pivot_megatron.model.swiglu import SwiGlu
from pivot_megatron.runtime.device import current_platform
from pivot_megatron.runtime.norm import RmsNorm


class Alone:
    """A tensor-parallel group of one."""

    def size(self) -> int:
        return 1


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_swiglu() -> None:
    both = normal(5, 1, 12, dtype=torch.float64).requires_grad_()
    gate, value = both.chunk(2, -1)
    assert torch.equal(SwiGlu(None)(both), silu(gate) * value)
    assert torch.autograd.gradcheck(SwiGlu(None), (both,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(dtype: torch.dtype) -> None:
    norm = RmsNorm(64, 1e-6, dtype)
    norm.weight.data = normal(64, seed=1, dtype=dtype)
    x, weights = normal(9, 1, 64, dtype=dtype).requires_grad_(), normal(9, 1, 64, seed=2, dtype=dtype)
    found = norm(x)
    slopes = torch.autograd.grad((found * weights).sum(), (x, norm.weight))
    exact = [t.detach().double().requires_grad_() for t in (x, norm.weight)]
    expected = rms_norm(exact[0], (64,), exact[1], 1e-6)
    wanted = torch.autograd.grad((expected * weights.double()).sum(), exact)
    for ours, theirs in zip((found, *slopes), (expected, *wanted)):
        # A few roundings of the type: 2^-23 and 2^-8 of the largest value.
        assert (ours.double() - theirs).abs().max() <= 4 * torch.finfo(dtype).eps * theirs.abs().max()


def test_rotation_is_transformers() -> None:
    from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

    frequencies = torch.outer(torch.tensor([0.0, 1, 2, 7, 3]), 1e4 ** -torch.arange(0, 1, 0.25))
    angles = torch.cat([frequencies, frequencies], -1)
    x = normal(5, 3, 8).requires_grad_()
    found = Rotation.at(angles[:, None, None], torch.float32)(x)
    expected, _ = apply_rotary_pos_emb(
        x.transpose(0, 1)[None], x.transpose(0, 1)[None], angles.cos()[None], angles.sin()[None]
    )
    assert torch.allclose(found, expected[0].transpose(0, 1), atol=1e-6)
    exact = x.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(Rotation.at(angles[:, None, None].double(), torch.float64), (exact,))


def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, words: int) -> Tensor:
    out: Tensor = vocabulary._TargetLogprobs.apply(hidden, weight, targets, words, Alone())
    return out


@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(0, 9), words=st.integers(2, 40), padding=st.integers(0, 5), tile=st.integers(4, 400))
def test_logprobs_in_any_tiles(tokens: int, words: int, padding: int, tile: int) -> None:
    """`tile` bytes: from one word of one token to everything at once."""
    platform = replace(current_platform(), logits_tile_bytes=tile)
    hidden = normal(tokens, 6, seed=1).requires_grad_()
    weight = normal(words + padding, 6, seed=2).requires_grad_()
    targets = torch.randint(0, words, (tokens,), generator=torch.Generator().manual_seed(3))
    factors = normal(tokens, seed=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "current_platform", lambda: platform)
        patch.setattr(vocabulary, "_TOKENS", 4)
        found = logprobs(hidden, weight, targets, words)
        slopes = torch.autograd.grad((found * factors).sum(), (hidden, weight))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = (exact[0] @ exact[1][:words].T).log_softmax(-1)[torch.arange(tokens), targets]
    wanted = torch.autograd.grad((expected * factors.double()).sum(), exact)
    for ours, theirs in zip((found, *slopes), (expected, *wanted)):
        assert ours.shape == theirs.shape
        assert ((ours.double() - theirs).abs() <= 1e-5).all()  # float32 over 40 words; measured at most 1e-6
    assert not slopes[1][words:].any()  # padding rows have no mass


def test_gradients_go_to_the_buffer() -> None:
    """With a data-parallel buffer both ends add to it, and hand nothing to autograd."""
    weight = torch.nn.Parameter(normal(12, 6))
    weight.main_grad = normal(12, 6, seed=1)
    before = weight.main_grad.clone()
    ids, elsewhere = torch.tensor([3, 0, 3]), torch.tensor([False, True, False])
    hidden = vocabulary._Lookup.apply(weight, ids, elsewhere)
    assert not hidden[1].any()
    logprobs(hidden, weight, torch.tensor([1, 2, 3]), 11).sum().backward()
    added = weight.main_grad - before
    plain = weight.detach().clone().requires_grad_()
    looked = embedding(ids, plain) * ~elsewhere[:, None]
    (looked @ plain[:11].T).log_softmax(-1)[torch.arange(3), torch.tensor([1, 2, 3])].sum().backward()
    assert weight.grad is None and weight.grad_added_to_main_grad
    assert torch.allclose(added, plain.grad, atol=1e-5)
    weight.gradient_must_appear = True
    logprobs(normal(3, 6), weight, torch.tensor([1, 2, 3]), 11).sum().backward()
    assert weight.grad is not None  # an overlapping reduction waits for it


def peak_mebibytes(call: Callable[[], object]) -> float:
    """The most that torch's allocator has handed out to `call` at any moment."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda e: e.start_ns()))) / 2**20


def ends_of(words: int, width: int, tokens: int, dtype: torch.dtype, overlap: bool) -> Callable[[], None]:
    """A step of both ends of a vocabulary over one weight, whose gradients go to a buffer."""
    weight = torch.nn.Parameter(torch.zeros(words, width, dtype=dtype))
    weight.main_grad = torch.zeros(words, width)
    weight.gradient_must_appear = overlap
    ids, elsewhere = torch.zeros(tokens, dtype=torch.long), torch.zeros(tokens, dtype=torch.bool)

    def step() -> None:
        logprobs(vocabulary._Lookup.apply(weight, ids, elsewhere), weight, ids, words).sum().backward()
        assert (weight.grad is not None) == overlap

    return step


@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlap"])
@pytest.mark.parametrize(
    ("words", "tokens", "dtype"),
    [
        *((words, 512, torch.float32) for words in (19_000, 38_000, 76_000, 152_000)),
        *((5_000, tokens, torch.float32) for tokens in (1, 8, 8192)),
        *((40_000, tokens, torch.bfloat16) for tokens in (1, 8, 512)),
    ],
)
def test_memory_grows_with_neither_end(words: int, tokens: int, dtype: torch.dtype, overlap: bool) -> None:
    """Beyond weights and their gradients a few tiles, whatever the number of words and of tokens, but for the tokens' hidden
    states; few tokens of many words take no more than many. Whole logits would take up to 300 MiB, the weight up to 37."""
    width = 64
    hidden = tokens * width * 4 / 2**20
    tile = current_platform().logits_tile_bytes / 2**20
    # A tile with its copies, and hidden states with their gradients; measured at most 2.3 MiB, and 6.1 with 8192 tokens.
    assert peak_mebibytes(ends_of(words, width, tokens, dtype, overlap)) <= 3 * tile + 3 * hidden
