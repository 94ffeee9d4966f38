"""What one transformer layer does to a micro-batch, kernel by kernel, on one tensor-parallel rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pivot_megatron.config.schema import Fp8Recipe
from pivot_megatron.plan.machine import Collective
from pivot_megatron.plan.workload import visible

Kind = Literal["gemm", "attention", "elementwise", "message"]


@dataclass(frozen=True)
class Operation:
    """`flops`; `traffic`: bytes read and written, or those of a message; `launches`: kernels, messages or segments. A product
    names the `dtype` of its inputs, a message what is sent."""

    name: str
    kind: Kind
    flops: float = 0.0
    traffic: float = 0.0
    launches: float = 1.0
    dtype: str = "bf16"
    collective: Collective = "send"


@dataclass(frozen=True)
class Numbers:
    """How a layer computes: `dtype` of its activations; `tensor` ranks, over which norms' and residuals' tokens are split too;
    `fused_norms`: a norm is one kernel, as Transformer Engine's; `recipe` of its linears, None where these are not in FP8."""

    dtype: Literal["bf16", "fp32"]
    tensor: int
    fused_norms: bool
    recipe: Fp8Recipe | None = None

    @property
    def gemm(self) -> Literal["bf16", "fp32", "fp8"]:
        """Of its linears' inputs."""
        return "fp8" if self.recipe else self.dtype

    @property
    def size(self) -> int:
        """Bytes of an activation."""
        return 2 if self.dtype == "bf16" else 4


@dataclass(frozen=True)
class LayerShape:
    """`gated`: the MLP is; `causal`: attention; `biased`: every linear has a bias. Widths are of the whole layer."""

    hidden: int
    heads: int
    groups: int
    head_dim: int
    ffn: int
    gated: bool
    causal: bool
    biased: bool

    def query_width(self, tensor: int) -> int:
        return self.heads * self.head_dim // tensor

    def key_width(self, tensor: int) -> int:
        """Of keys alone; where there are more ranks than groups, each has a whole one."""
        return max(1, self.groups // tensor) * self.head_dim

    def linears(self, tensor: int) -> tuple[tuple[str, int, int], ...]:
        """(name, rows, columns) of a rank's weights."""
        query, key, ffn = self.query_width(tensor), self.key_width(tensor), self.ffn // tensor
        return (
            ("qkv", query + 2 * key, self.hidden),
            ("proj", self.hidden, query),
            ("fc1", (2 if self.gated else 1) * ffn, self.hidden),
            ("fc2", self.hidden, ffn),
        )


def product(name: str, m: int, n: int, k: int, dtype: str, result: int, times: float = 1.0) -> Operation:
    """`[m, k] x [k, n]`; `result`: bytes of an entry of what comes out."""
    size = {"fp8": 1, "bf16": 2, "fp32": 4}[dtype]
    traffic = size * (m * k + k * n) + result * m * n
    return Operation(name, "gemm", times * 2.0 * m * n * k, times * traffic, times, dtype)


def attention_flops(layer: LayerShape, segments: Sequence[tuple[int, int]], tensor: int) -> float:
    """Scores and weighted sums, of what each query sees."""
    seen = visible(segments) if layer.causal else float(sum(queries * keys for queries, keys in segments))
    return 4.0 * seen * layer.query_width(tensor)


def forward(
    layer: LayerShape, numbers: Numbers, tokens: int, segments: Sequence[tuple[int, int]], past_attention: int | None
) -> list[Operation]:
    """`past_attention`: how many tokens go through the MLP, where that is not all of them."""
    wide = tokens if past_attention is None else past_attention
    rows = {"qkv": tokens, "proj": tokens, "fc1": wide, "fc2": wide}
    products = [
        product(name, rows[name], n, k, numbers.gemm, numbers.size) for name, n, k in layer.linears(numbers.tensor)
    ]
    return [
        *products,
        Operation(
            "attention",
            "attention",
            attention_flops(layer, segments, numbers.tensor),
            launches=len(segments),
            dtype=numbers.dtype,
        ),
        _elementwise("norms, rotations, activations", numbers, _touched(layer, numbers, tokens, wide, segments, 0)),
        *messages(numbers, layer.hidden, "gather", [tokens, wide]),
        *messages(numbers, layer.hidden, "scatter", [tokens, wide]),
    ]


def backward(
    layer: LayerShape,
    numbers: Numbers,
    tokens: int,
    segments: Sequence[tuple[int, int]],
    past_attention: int | None,
    weights_train: bool,
) -> list[Operation]:
    """Towards the layer's input, and towards its weights where they train; accumulating their gradients is not in it."""
    wide = tokens if past_attention is None else past_attention
    rows = {"qkv": tokens, "proj": tokens, "fc1": wide, "fc2": wide}
    found: list[Operation] = []
    for name, n, k in layer.linears(numbers.tensor):
        found.append(product(f"{name}, towards its input", rows[name], k, n, numbers.gemm, numbers.size))
        if weights_train:
            found.append(product(f"{name}, towards its weight", n, k, rows[name], numbers.gemm, numbers.size))
    again = [tokens, wide] if weights_train else []  # a linear keeps its rank's share of the input alone
    return [
        *found,
        # FlashAttention's backward makes the scores anew: five products for the forward's two (Dao 2023).
        Operation(
            "attention",
            "attention",
            2.5 * attention_flops(layer, segments, numbers.tensor),
            launches=len(segments),
            dtype=numbers.dtype,
        ),
        _elementwise("norms, rotations, activations", numbers, _touched(layer, numbers, tokens, wide, segments, 1)),
        *messages(numbers, layer.hidden, "gather", [tokens, wide, *again]),
        *messages(numbers, layer.hidden, "scatter", [tokens, wide]),
    ]


def messages(
    numbers: Numbers, width: int, name: Literal["gather", "scatter", "reduce"], tokens: list[int]
) -> list[Operation]:
    """Ring collectives of activations over tensor-parallel ranks: an all-gather and a reduce-scatter send (n - 1) / n of all
    bytes, an all-reduce twice that (Thakur et al. 2005)."""
    ranks = numbers.tensor
    if ranks == 1:
        return []
    factor = (2.0 if name == "reduce" else 1.0) * (ranks - 1) / ranks
    sent = factor * sum(tokens) * width * numbers.size
    return [Operation(f"tensor-parallel {name}", "message", traffic=sent, launches=len(tokens), collective=name)]


def _elementwise(name: str, numbers: Numbers, touched: float) -> Operation:
    """`touched`: entries read or written."""
    return Operation(name, "elementwise", traffic=numbers.size * touched, launches=_LAUNCHES)


_LAUNCHES = 30.0
"""Kernels of a layer, forward or backward, beside its products: counted in a profile."""

# Entries read and written for each entry of what they are about, (forward, backward), by the passes that each kind makes:
# as torch's kernels that runtime/norm.py, model/rotary.py and model/swiglu.py call, one after another.
NORM_PASSES = {"RMSNorm": (5.0, 18.0), "LayerNorm": (3.0, 8.0), "fused": (2.0, 5.0)}
RESIDUAL_PASSES = (3.0, 3.0)
ROTATION_PASSES = (5.0, 5.0)
SWIGLU_PASSES = (5.0, 11.0)
GELU_PASSES = (2.0, 3.0)
_BIAS = (2.0, 1.0)
_GATHERED_KEYS = (2.0, 3.0)
_LAID_TOGETHER = (2.0, 2.0)


def _touched(
    layer: LayerShape, numbers: Numbers, tokens: int, wide: int, segments: Sequence[tuple[int, int]], way: int
) -> float:
    """Entries that a layer's kernels beside products and attention read and write; `way` 0 forward, 1 backward."""
    query, key, ffn = layer.query_width(numbers.tensor), layer.key_width(numbers.tensor), layer.ffn // numbers.tensor
    keys = sum(found for _, found in segments)
    kind = "fused" if numbers.fused_norms else "RMSNorm" if layer.gated and not layer.biased else "LayerNorm"
    biases = layer.biased * _BIAS[way]
    residual = (tokens + wide) * layer.hidden / numbers.tensor  # one after attention and one after the MLP
    total = residual * (NORM_PASSES[kind][way] + RESIDUAL_PASSES[way] + biases)
    total += tokens * (query * _LAID_TOGETHER[way] + (query + 2 * key) * (_BIAS[way] + (way and _LAID_TOGETHER[way])))
    if layer.causal:
        total += tokens * (query + key) * ROTATION_PASSES[way] + 2 * keys * key * _GATHERED_KEYS[way]
    return total + wide * ffn * (SWIGLU_PASSES[way] if layer.gated else GELU_PASSES[way] + biases)
