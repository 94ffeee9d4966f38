"""Packed attention on each kernel of this machine, forward and backward, against torch's attention in fp32."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from itertools import accumulate, product

import torch

from pivot_megatron.runtime import attention
from pivot_megatron.runtime.attention import Heads, Kernel, Spans
from pivot_megatron.runtime.device import current_platform
from tests.gpu.machine import seconds
from tests.gpu.models import difference
from tests.gpu.rows import Row, held, told

# A prefix with its first answer, and an answer that sees a prefix which it is no part of.
PAIRS = ((700, 700), (90, 670), (64, 64), (33, 64), (16, 16))
IMAGES = ((576, 576), (576, 576), (196, 196))
WIDTHS = (64, 72, 96, 128)
LIMIT = 2e-2  # two roundings to bf16, of probabilities and of the result, with gradients through both

KERNELS: dict[str, tuple[str, Callable[[Heads], Kernel]]] = {
    "te": ("transformer_engine", attention._te),
    "torch-varlen": ("torch.nn.attention.varlen", attention._torch_varlen),
    "flash-attn": ("flash_attn", attention._flash_attn),
}


def rows() -> Iterator[Row]:
    for name, (module, builder) in KERNELS.items():
        if importlib.util.find_spec(module) is None:
            yield told(name, "not installed")
            continue
        for width, (groups, causal) in product(WIDTHS, ((2, True), (14, True), (14, False))):
            heads = Heads(14, groups, width, width**-0.5, causal)
            try:
                yield from compared(name, heads, builder(heads), torch.bfloat16)
            except Exception as error:  # one that this machine cannot run is a row, and the rest go on
                yield Row(
                    _name(name, heads), f"{type(error).__name__}: {str(error).splitlines()[0][:160]}", passed=False
                )


def _name(kernel: str, heads: Heads) -> str:
    return f"{kernel}, width {heads.width}, {heads.groups} of {heads.queries} groups, {'causal' if heads.causal else 'full'}"


def compared(kernel: str, heads: Heads, attend: Kernel, dtype: torch.dtype) -> Iterator[Row]:
    lengths = PAIRS if heads.causal else IMAGES
    device = current_platform().device
    query_ends, key_ends = (
        torch.tensor([0, *accumulate(side)], dtype=torch.int32, device=device) for side in zip(*lengths)
    )
    spans = Spans(lengths, query_ends, key_ends)
    generator = torch.Generator().manual_seed(heads.width)
    totals = (
        (int(query_ends[-1]), heads.queries),
        (int(key_ends[-1]), heads.groups),
        (int(key_ends[-1]), heads.groups),
    )
    given = [
        torch.randn(*total, heads.width, generator=generator).to(device, dtype).requires_grad_() for total in totals
    ]
    towards = torch.randn(*given[0].shape, generator=generator).to(device, dtype)
    exact = [x.detach().float().requires_grad_() for x in given]
    wanted = attention._sdpa(heads)(*exact, spans)
    slopes = torch.autograd.grad(wanted, exact, towards.float())

    def both() -> tuple[torch.Tensor, ...]:
        out = attend(*given, spans)
        return (out, *torch.autograd.grad(out, given, towards))

    found = both()
    worst = max(difference(a, b) for a, b in zip(found, (wanted, *slopes)))
    yield held(_name(kernel, heads), worst, LIMIT)
    taken = f"{1e3 * seconds(both, warm_up=3, repeats=10):.3f} ms"
    yield told(f"{_name(kernel, heads)}: time and backend", f"{taken}{_backend() if kernel == 'te' else ''}")


def _backend() -> str:
    """Which of its own Transformer Engine chose last."""
    from transformer_engine.pytorch.attention.dot_product_attention import dot_product_attention as chosen

    state = chosen._attention_backends
    if state["use_flash_attention"]:
        return f", flash-attn {state['flash_attention_backend']}"
    return f", cuDNN {state['fused_attention_backend']}" if state["use_fused_attention"] else ", unfused"
