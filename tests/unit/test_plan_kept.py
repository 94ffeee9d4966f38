"""What a layer is said to keep for its backward pass, against what autograd keeps of a real one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pivot_megatron.config.schema import Layout, Precision, Recompute
from pivot_megatron.data.packing import pack
from pivot_megatron.data.tokens import Branch, Tokenized
from pivot_megatron.data.views import View
from pivot_megatron.model.composition import Architecture, build_model
from pivot_megatron.plan.layer_work import Numbers
from pivot_megatron.plan.memory import kept_bytes
from pivot_megatron.plan.model_work import encoder_layer, head_layer
from pivot_megatron.plan.workload import Lengths, Pack
from pivot_megatron.runtime.distributed import process_groups
from tests.plans import SO400M, model, qwen2

VISION = SO400M | {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 4, "image_size": 160}
PAIRS, PROMPT, ANSWERS = 2, 40, (110, 130)
"""Segments longer than those that attention on CPU lays out in rows."""


def arch(encoder: int, head: int) -> Architecture:
    return model(VISION | {"num_hidden_layers": encoder + 1}, qwen2(128, 352, head, 4, 2, 300, tied=True))


def pairs(tokens: int) -> list[Tokenized]:
    side = int(tokens**0.5)
    branches = tuple(Branch((1,) * n, (True,) * n) for n in ANSWERS)
    return [
        Tokenized(str(n), (0,) * tokens + (1,) * PROMPT, branches, (0,), (View.of_patches(side, side),))
        for n in range(PAIRS)
    ]


def saved_bytes(built: Architecture, mode: Any) -> int:
    """Of a forward pass, each storage once, parameters not."""
    samples = pairs(built.encoder.tokens)
    size = built.encoder.image_size
    batch = pack(samples, [torch.zeros(1, 3, size, size)] * PAIRS, 2, 4)
    whole = build_model(built, Layout(), Precision("fp32"), Recompute(mode, mode)).whole
    owned = {p.untyped_storage().data_ptr() for p in whole.parameters()}
    kept: dict[int, Any] = {}  # held, so that no other storage comes to the same place

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = whole(batch)
    del out
    found = sum(storage.nbytes() for place, storage in kept.items() if place not in owned)
    return found - (masks(built, samples) if mode == "none" else 0)


def masks(built: Architecture, samples: list[Tokenized]) -> int:
    """Of every second branch over what it sees, which the kernel on CPU keeps and those on a GPU do not."""
    _, second = ANSWERS
    return built.head.layers * len(samples) * 4 * second * (len(samples[0].prefix) + second)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_a_layer_keeps_what_is_counted(mode: Any) -> None:
    """By what two more layers add. Numbers a row of norms, and of attention's sums, are not counted: under 1 % in the head and
    2 % in an encoder so narrow."""
    small = arch(2, 2)
    tokens = small.encoder.tokens
    lengths = Lengths(tokens + PROMPT, ANSWERS, sum(ANSWERS), 1, tokens)
    packed = Pack((lengths,) * PAIRS, 4)
    numbers = Numbers("fp32", 1, False)
    with process_groups(Layout(), seed=1):
        base = saved_bytes(small, mode)
        head = (saved_bytes(arch(2, 4), mode) - base) / 2
        encoder = (saved_bytes(arch(4, 2), mode) - base) / 2
    counted = kept_bytes(head_layer(small.head), numbers, packed.tokens, packed.keys, mode)
    assert counted == pytest.approx(head, rel=0.01)
    seen = kept_bytes(encoder_layer(small.encoder), numbers, PAIRS * tokens, PAIRS * tokens, mode)
    assert seen == pytest.approx(encoder, rel=0.02)
