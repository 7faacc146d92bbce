"""A product of rank r in r(m + n - r) numbers: r of its rows (or columns) as they are, and the others in terms of them."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LIMIT = 1e3  # above this Z loses the digits that float32 has to spare
STRONG = 2.0  # what exchanging rows brings max |Z| down to, as a strong rank-revealing QR does
EXCHANGES = 400


@dataclass(frozen=True)
class Pivot:
    """B A in pivoted form.

    side "out": rows index[:r] of B A are P (rank, in_features), the others are Z P with Z (out_features - rank, rank);
    y = cat([P x, Z (P x)])[..., index], index (out_features,).
    side "in": P (out_features, rank) are the pivot columns, Z (in_features - rank, rank); with x' = x[..., index],
    y = P (x'[:rank] + Zᵀ x'[rank:]), index (in_features,).
    P and Z in the dtype asked for; index int64.
    """

    P: Tensor
    Z: Tensor
    index: Tensor
    side: Literal["out", "in"]


@dataclass(frozen=True)
class Refusal:
    """Why a product has no usable pivoted form; the two-factor form is to be used."""

    reason: str


def pivot(B: Tensor, A: Tensor, side: Literal["out", "in"] = "out", *, dtype: torch.dtype | None = None) -> Pivot | Refusal:
    """Return the product B A in pivoted form, or the reason why it has none.

    B: (out_features, rank), A: (rank, in_features); rank <= min(out_features, in_features). dtype: of P and Z, that of B
    when left out. Rows are chosen by LU with row pivoting of an orthonormal basis of B's range, then exchanged until
    max |Z| <= 2 (at most 400 exchanges); Z by a triangular solve, in float64. A basis of full rank is used even where B has
    dependent columns, so these are no obstacle. Refused where max |Z| stays over 1e3 or is not finite.
    Source: Cheng, Gimbutas, Martinsson & Rokhlin (2005), doi:10.1137/030602678, and Gu & Eisenstat (1996),
    doi:10.1137/0917055 (exchanges); the layer form after PIFA (2025), arXiv:2501.19090. Departure: LU in place of QR with
    column pivoting for the first choice of rows, which is several times faster and corrected by the same exchanges.
    """
    dtype = B.dtype if dtype is None else dtype
    left, right = (B, A) if side == "out" else (A.T, B.T)
    left, right = left.detach().double(), right.detach().double()
    rows, rank = left.shape
    if rank > rows:
        return Refusal(f"rank {rank} is more than the {rows} rows to choose from")
    Q, _ = torch.linalg.qr(left)
    order, Z = _choose(Q)
    _exchange(order, Z)
    largest = float(Z.abs().max()) if Z.numel() else 0.0
    if not largest < LIMIT:
        return Refusal(f"max |Z| = {largest:.3g} is over {LIMIT:g}: the pivoted form would lose digits")
    P = left[order[:rank]] @ right
    index = order.argsort() if side == "out" else order
    return Pivot((P if side == "out" else P.T).to(dtype).contiguous(), Z.to(dtype).contiguous(), index, side)


def _choose(Q: Tensor) -> tuple[Tensor, Tensor]:
    """Return the order (rows, pivots first) and Z with Q[order[r:]] = Z Q[order[:r]]."""
    rank = Q.shape[1]
    LU, swaps = torch.linalg.lu_factor(Q)
    permutation, L, _ = torch.lu_unpack(LU, swaps, unpack_data=True)
    order = permutation.argmax(0)  # Q = permutation @ L @ U: row order[i] of Q is row i of L U
    Z = torch.linalg.solve_triangular(L[:rank], L[rank:], upper=False, left=False, unitriangular=True)
    return order, Z.contiguous()


def _exchange(order: Tensor, Z: Tensor) -> None:
    """Swap a pivot row with another, in place, while that shrinks max |Z|: each swap multiplies |det| by that entry."""
    rank = Z.shape[1]
    for _ in range(EXCHANGES if Z.numel() else 0):
        place = int(Z.abs().argmax())
        i, j = divmod(place, rank)
        entry = float(Z[i, j])
        if not abs(entry) > STRONG:
            return
        row, column = Z[i].clone(), Z[:, j].clone()
        row[j] -= 1.0
        column[i] += 1.0
        Z.addr_(column, row, alpha=-1.0 / entry)
        first, second = int(order[j]), int(order[rank + i])
        order[j], order[rank + i] = second, first
