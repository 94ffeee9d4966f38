"""A pass through an attention kernel before a run depends on it: that one loads does not say that it runs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from pivot_megatron.errors import UserError, in_a_line
from pivot_megatron.runtime.attention import DESCRIPTIONS, Heads, Kernel, KernelName, Spans, build_kernel, choose_kernel
from pivot_megatron.runtime.device import current_platform

_LENGTHS = ((32, 32), (16, 48))  # a sequence of its own, and one that also sees keys before it
_LIMIT = 0.1  # of the largest value: some roundings of a 16-bit float are below, another mask or scale is far above

_REMEDIES: dict[KernelName, str] = {
    "te": "install flash-attn, which it uses where it is there, or a transformer-engine and cuDNN that support them",
    "flash-attn": "install transformer-engine, or a flash-attn that was built for this torch and GPU",
    "torch-varlen": "install transformer-engine or flash-attn",
}


def require_kernel(heads: Heads, dtype: torch.dtype) -> None:
    """Raises UserError where the kernel that this machine has for `dtype` fails with such heads, forward or backward, or gives
    other numbers than torch's own attention in float32."""
    name = choose_kernel(dtype).name
    if name == "sdpa":
        return
    try:
        worst = _difference(heads, dtype)
        why = None if worst <= _LIMIT else f"its results differ from those of torch's own in float32 by {worst:.0%}"
    except Exception as error:  # whatever a package or the device says
        why = in_a_line(error)
    if why is not None:
        raise UserError(
            f"precision.compute: expected {DESCRIPTIONS[name]} to run {'causal' if heads.causal else 'full'} heads of width "
            f"{heads.width} on {current_platform().device}, found that it does not ({why}); {_REMEDIES[name]}, or set "
            "precision.compute: fp32"
        )


def _difference(heads: Heads, dtype: torch.dtype) -> float:
    """The largest of the output and of each gradient, relative to the largest value there."""
    device = current_platform().device
    query_ends, key_ends = (
        torch.tensor([0, *accumulate(side)], dtype=torch.int32) for side in zip(*_LENGTHS, strict=True)
    )
    spans = Spans(_LENGTHS, query_ends.to(device), key_ends.to(device))
    queries, keys = int(query_ends[-1]), int(key_ends[-1])
    generator = torch.Generator().manual_seed(0)
    drawn = [
        torch.randn(tokens, count, heads.width, generator=generator).to(device, dtype)
        for tokens, count in (
            (queries, heads.queries),
            (queries, heads.queries),
            (keys, heads.groups),
            (keys, heads.groups),
        )
    ]
    found, exact = (
        _pass(build_kernel(heads, kind), [x.to(kind) for x in drawn], spans) for kind in (dtype, torch.float32)
    )
    off = [(a.float() - b).abs().max() / b.abs().max() for a, b in zip(found, exact, strict=True)]
    return float(torch.stack(off).max())  # NaN where any is


def _pass(kernel: Kernel, drawn: Sequence[Tensor], spans: Spans) -> tuple[Tensor, ...]:
    """Output and gradients of queries, keys and values, from the output's gradient and these."""
    towards, *given = drawn
    query, key, value = (x.detach().requires_grad_() for x in given)
    out = kernel(query, key, value, spans)
    return (out.detach(), *torch.autograd.grad(out, (query, key, value), towards))
