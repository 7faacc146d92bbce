"""W = P L D U: a pivoted LU decomposition with the diagonal taken out of U."""

from typing import NamedTuple

import torch
from torch import Tensor


class Ldu(NamedTuple):
    """The first r terms of W[order] = L diag(d) U.

    order: (out_features,), int64, the rows of W in pivot order. L: (out_features, r), unit lower trapezoidal, no entry above 1
    in size. d: (r,), in pivot order, not sorted. U: (r, in_features), upper trapezoidal, with ones on its diagonal where
    `unit`; else the rows of tiny pivots are as they are, and their d is 1.
    """

    order: Tensor
    L: Tensor
    d: Tensor
    U: Tensor
    unit: bool

    def product(self) -> Tensor:
        """Return P L diag(d) U, (out_features, in_features)."""
        return (self.L * self.d @ self.U)[self.order.argsort()]


def ldu(weight: Tensor, rank: int) -> Ldu:
    """Return the first `rank` terms of the pivoted LU decomposition of weight (out_features, in_features), in float64.

    A pivot is tiny where rounding in the weight's own dtype can have made it. The product is no best approximation of its
    rank: it equals the weight in its first `rank` columns and its first `rank` pivot rows.
    Source: Golub & Van Loan (2013), section 3.4; as an adapter: LoLDU (2024), arXiv:2410.13618.
    """
    packed, pivots, _ = torch.linalg.lu_factor_ex(weight.double().cpu())
    order = list(range(weight.shape[0]))
    for i, p in enumerate(pivots.tolist()):  # LAPACK's swaps, one after the other, counted from 1
        order[i], order[p - 1] = order[p - 1], order[i]
    L = packed[:, :rank].tril(-1)
    L.diagonal().fill_(1)
    U = packed[:rank].triu()
    d = U.diagonal().clone()
    noise = 8 * max(weight.shape) * torch.finfo(weight.dtype).eps  # of the largest pivot
    tiny = d.abs() <= noise * packed.diagonal().abs().max()
    d[tiny] = 1
    return Ldu(torch.tensor(order), L, d, U / d[:, None], not bool(tiny.any()))
