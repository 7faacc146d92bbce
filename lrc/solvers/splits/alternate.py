"""The loop of low-rank and sparse steps that several splitters share."""

from collections.abc import Callable

import torch
from torch import Tensor

from lrc.solvers.splits.base import Split
from lrc.solvers.splits.low_rank import LowRank, balanced_factors


def alternate(
    weight: Tensor,
    scale: Tensor,
    rank: int,
    support_of: Callable[[Tensor], Tensor],
    iterations: int,
    tolerance: float = 0.0,
) -> Split:
    """Return W ≈ B A + S that low-rank and sparse steps by turns bring near in the norm ||(W - B A - S) diag(scale)||_F.

    scale: (in_features,), positive, float64. support_of: takes the scaled rest, and says where S may stand (bool). Stops
    when the squared error, of that of W, falls by no more than `tolerance`.
    """
    W = weight.double() * scale
    whole = float(W.square().sum())
    low_rank = LowRank(min(rank, *weight.shape))
    S = torch.zeros_like(W)
    support = torch.zeros_like(W, dtype=torch.bool)
    history: list[float] = []
    B, A = W[:, :0], W[:0]
    for _ in range(iterations):
        B, A = low_rank.factors(W - S)
        rest = W - B @ A
        support = support_of(rest)
        S = torch.where(support, rest, 0.0)
        history.append(float((rest - S).norm()))
        if len(history) > 1 and history[-2] ** 2 - history[-1] ** 2 <= tolerance * whole:
            break
    B, A = balanced_factors(B, A, torch.float64)
    error = history[-1] / whole**0.5 if whole else 0.0
    B, A, rest = B.to(weight.dtype), (A / scale).to(weight.dtype), (S / scale).to(weight.dtype)
    return Split(B, A, rest, support, error, tuple(history), loss=history[-1] ** 2)
