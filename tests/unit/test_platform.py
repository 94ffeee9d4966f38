"""What this machine cannot do is an error, and what stands in for CUDA leaves everything else as it is."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

import pivot_megatron.runtime  # noqa: F401
from pivot_megatron.config.schema import Fp8, Layout, Precision
from pivot_megatron.errors import UserError
from pivot_megatron.families.architecture import EncoderArchitecture
from pivot_megatron.model.specs import encoder_config
from pivot_megatron.runtime import cpu
from pivot_megatron.runtime.adam import GroupStepAdam
from pivot_megatron.runtime.device import current_platform, use_threads

without_cuda = pytest.mark.skipif(current_platform().is_cuda, reason="the stand-in is for machines without CUDA")


@without_cuda
def test_fp8_without_transformer_engine_is_an_error() -> None:
    arch = EncoderArchitecture("siglip", 2, 32, 4, 48, 32, 8, 1e-6, "gelu_tanh", feature_layer=-2)
    fp8 = Fp8("tensorwise")
    with pytest.raises(UserError, match=r"precision.fp8: needs a CUDA device and transformer-engine"):
        encoder_config(arch, 1, Layout(), Precision("bf16", fp8))
    assert encoder_config(arch, 1, Layout(), Precision("bf16", replace(fp8, encoder=False))).fp8 is None


@without_cuda
def test_stand_in_leaves_torch_to_others() -> None:
    """Factories keep their identity (meta-device contexts look for it), and only megatron-core sees "cuda" as the CPU."""
    cpu.install()  # a second time changes nothing
    with torch.device("meta"):
        assert torch.zeros(2).is_meta and torch.empty(2).is_meta and torch.tensor([1]).is_meta
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")
    from megatron.core.optimizer import clip_grads

    assert clip_grads.torch.zeros(1, device="cuda").device == torch.device("cpu")
    assert current_platform().backend == "gloo"


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_equals_torch(weight_decay: float, decoupled: bool) -> None:
    """In float64, over ten steps, with one parameter that gets no gradient."""
    generator = torch.Generator().manual_seed(0)
    start = [
        torch.randn(3, 4, generator=generator, dtype=torch.float64),
        torch.randn(5, generator=generator, dtype=torch.float64),
    ]
    grads = [[torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in start] for _ in range(10)]

    def train(kind: object, **options: object) -> list[torch.Tensor]:
        params = [torch.nn.Parameter(p.clone()) for p in (*start, start[0])]
        optimizer = kind(params, lr=1e-2, betas=(0.8, 0.9), eps=1e-7, weight_decay=weight_decay, **options)  # type: ignore[operator]
        for step in grads:
            for parameter, grad in zip(params, step):
                parameter.grad = grad.clone()
            optimizer.step()
        return [p.detach() for p in params]

    ours = train(GroupStepAdam, adam_w_mode=decoupled)
    theirs = train(torch.optim.AdamW if decoupled else torch.optim.Adam)
    for a, b in zip(ours, theirs):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


def test_threads_are_shared_between_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    try:
        for processes, wanted, expected in ((1, None, 8), (4, None, 2), (16, None, 1), (4, 3, 3)):
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
            use_threads(wanted)
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
