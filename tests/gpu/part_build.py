"""Does this build of Transformer Engine compute at all: a linear, its gradient accumulation, FP8, Adam, attention."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from pivot_megatron.runtime.device import current_platform
from pivot_megatron.train.run_folder import installed_version
from tests.gpu.models import difference
from tests.gpu.rows import CannotRun, Row, held, told

DEVICE = "cuda"


def rows() -> Iterator[Row]:
    yield from _versions()
    if not current_platform().transformer_engine:
        raise CannotRun("needs transformer-engine")
    yield from _linear()
    yield from _fp8_linear()
    yield from _adam()
    yield from _attention()


def _versions() -> Iterator[Row]:
    properties = torch.cuda.get_device_properties(0)
    yield told("device", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    yield told("python", platform.python_version())
    yield told("torch", f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    for package in ("transformer-engine", "megatron-core", "transformers"):
        yield told(package, installed_version(package) or "none")


def _linear() -> Iterator[Row]:
    import transformer_engine.pytorch as te

    torch.manual_seed(1)
    layer = te.Linear(256, 384, params_dtype=torch.bfloat16, fuse_wgrad_accumulation=True, device=DEVICE)
    x = torch.randn(128, 256, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    towards = torch.randn(128, 384, device=DEVICE, dtype=torch.bfloat16)
    layer.weight.main_grad = torch.zeros(384, 256, device=DEVICE)
    layer.weight.grad_added_to_main_grad = False
    exact = [t.detach().float().requires_grad_() for t in (x, layer.weight, layer.bias)]
    wanted = linear(*exact)
    wanted.backward(towards.float())
    for _ in range(2):
        out = layer(x)
        out.backward(towards)
    yield held("te.Linear, bf16: output", difference(out, wanted), 1e-2)
    yield held("te.Linear, bf16: two inputs' gradients", difference(x.grad, 2 * exact[0].grad), 1e-2)
    yield held(
        "te.Linear: weight gradient added twice to main_grad",
        difference(layer.weight.main_grad, 2 * exact[1].grad),
        1e-2,
    )


def _fp8_linear() -> Iterator[Row]:
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe as recipes

    known = {
        "delayed": recipes.DelayedScaling(),
        "tensorwise": recipes.Float8CurrentScaling(),
        "blockwise": recipes.Float8BlockScaling(),
    }
    # Sizes that the paddings leave: So400m's padded FFN at TP 2, and 16 tokens more than a round number.
    for name, recipe in known.items():
        tokens = 512 if name == "blockwise" else 528
        layer = te.Linear(1152, 2176, params_dtype=torch.bfloat16, device=DEVICE)
        x = torch.randn(tokens, 1152, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        towards = torch.randn(tokens, 2176, device=DEVICE, dtype=torch.bfloat16)
        exact = [t.detach().float().requires_grad_() for t in (x, layer.weight, layer.bias)]
        wanted = linear(*exact)
        wanted.backward(towards.float())
        for _ in range(2):  # `delayed` has its first scales after the first pass
            x.grad = layer.weight.grad = None
            with te.fp8_autocast(enabled=True, fp8_recipe=recipe):
                out = layer(x)
            out.backward(towards)
        # Three bits of mantissa: 2^-4 at most a value, and half of that on average.
        yield held(f"te.Linear, FP8 {name}: output", difference(out, wanted), 0.06)
        yield held(f"te.Linear, FP8 {name}: input's gradient", difference(x.grad, exact[0].grad), 0.1)
        yield held(f"te.Linear, FP8 {name}: weight's gradient", difference(layer.weight.grad, exact[1].grad), 0.1)


def _adam() -> Iterator[Row]:
    from transformer_engine.pytorch.optimizers import FusedAdam

    torch.manual_seed(2)
    start = [torch.randn(33, 65, device=DEVICE), torch.randn(7, device=DEVICE)]
    gradients = [[torch.randn_like(p) for p in start] for _ in range(10)]
    ends = []
    for kind in (FusedAdam, torch.optim.AdamW):
        parameters = [torch.nn.Parameter(p.clone()) for p in start]
        optimizer = kind(parameters, lr=1e-2, betas=(0.9, 0.99), eps=1e-7, weight_decay=0.1)
        for step in gradients:
            for parameter, gradient in zip(parameters, step):
                parameter.grad = gradient.clone()
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in parameters]))
    yield held("FusedAdam: weights after 10 steps", difference(*ends), 1e-5)


def _attention() -> Iterator[Row]:
    import transformer_engine.pytorch as te

    torch.manual_seed(3)
    q, k, v = (torch.randn(2, 256, 8, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    attention = te.DotProductAttention(8, 64, attention_dropout=0.0, qkv_format="bshd", attn_mask_type="causal")
    wanted = scaled_dot_product_attention(*(x.float().transpose(1, 2) for x in (q, k, v)), is_causal=True)
    yield held(
        "te.DotProductAttention, causal", difference(attention(q, k, v), wanted.transpose(1, 2).flatten(2)), 2e-2
    )
