"""How alike two models see the same things: mutual nearest neighbours, and centred kernel alignment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pivot_megatron.errors import UserError


def neighbours(features: Tensor, k: int) -> Tensor:
    """`[n, width]` to the indices `[n, k]` of each one's nearest others by cosine similarity. Raises UserError for `k` >= n."""
    if not 0 < k < len(features):
        raise UserError(
            f"alignment: expected 1 to {len(features) - 1} neighbours of {len(features)} samples, found {k}"
        )
    unit = normalize(features.double(), dim=-1)
    return (unit @ unit.T).fill_diagonal_(-torch.inf).topk(k).indices


def mutual_neighbours(one: Tensor, other: Tensor) -> Tensor:
    """Of each sample the share `[n]`, float64, of its `k` nearest neighbours `[n, k]` that both have.

    The mean over samples is the mutual k-nearest-neighbour metric. Source: Huh et al., "The Platonic Representation Hypothesis"
    (arXiv 2405.07987).
    """
    return (one[:, :, None] == other[:, None, :]).any(dim=2).double().mean(dim=1)


def centred_kernel(features: Tensor) -> Tensor:
    """`[n, width]` to the centred linear kernel `[n, n]`, of Frobenius norm 1, float64; zeros where all features are the same."""
    centred = features.double() - features.double().mean(dim=0)
    kernel = centred @ centred.T
    norm = torch.linalg.norm(kernel)
    return kernel / norm if norm > 0 else kernel


def linear_cka(one: Tensor, other: Tensor) -> float:
    """Of two kernels as `centred_kernel` gives them. Source: Kornblith et al., "Similarity of Neural Network Representations
    Revisited" (arXiv 1905.00414)."""
    return float((one * other).sum())


@dataclass(frozen=True)
class Alignment:
    """Of two models, at the pair of layers that agrees best by each measure. `overlaps`: of each sample, at the best pair by
    neighbours. Layers are counted from 0. The best of many pairs is a little optimistic, alike for every encoder."""

    overlaps: tuple[float, ...]
    layers: tuple[int, int]
    cka: float
    cka_layers: tuple[int, int]

    @property
    def mutual(self) -> float:
        return sum(self.overlaps) / len(self.overlaps)


def best_alignment(ones: Sequence[Tensor], others: Sequence[Tensor], k: int) -> Alignment:
    """`ones`, `others`: of each model, by layer, features `[n, width]` of the same n things in the same order."""
    near = [[neighbours(features, k) for features in model] for model in (ones, others)]
    pairs = [(i, j) for i in range(len(ones)) for j in range(len(others))]
    shares = {(i, j): mutual_neighbours(near[0][i], near[1][j]) for i, j in pairs}
    best = max(pairs, key=lambda pair: float(shares[pair].mean()))
    kernels = [[centred_kernel(features) for features in model] for model in (ones, others)]
    ckas = {(i, j): linear_cka(kernels[0][i], kernels[1][j]) for i, j in pairs}
    most = max(pairs, key=lambda pair: ckas[pair])
    return Alignment(tuple(shares[best].tolist()), best, ckas[most], most)
