"""Alternating least squares for M ≈ U Vᵀ where every entry of M has a weight, that may be zero."""

import math
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from lrc.solvers.halfstep import Lsq, Weighted, refitted

FLOOR = 1e-8  # of the mean weight: rows and columns that weigh less are scaled as if they weighed as much
ROUNDING = 1e-30  # of the weighted energy of M: a squared error below it is rounding
EXACT = 1e-18  # of it: a squared error below this, and below what the ridge leaves, is that of the ridge


class Matrix(Weighted, Protocol):
    """What a whole weighted matrix offers beyond its rows."""

    @property
    def T(self) -> Self:  # noqa: N802  # as of a tensor
        """The transpose."""

    @property
    def mean_weight(self) -> float:
        """The mean weight over all entries."""

    @property
    def density(self) -> float:
        """The share of entries with a weight."""

    def loss(self, X: Tensor, F: Tensor) -> float:
        """Return the weighted squared error of X Fᵀ."""

    def means(self) -> tuple[Tensor, Tensor]:
        """Return the mean weights of the rows and of the columns."""

    def is_rank_one(self, left: Tensor, right: Tensor) -> bool:
        """Return whether the weights are left² right²ᵀ."""

    def leading(self, left: Tensor, right: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return the first singular triplets of diag(left) M diag(right), entries without a weight taken as 0."""


class Fit(NamedTuple):
    """U (rows, rank) and V (columns, rank), float64, balanced; the weighted squared error before and after each sweep."""

    U: Tensor
    V: Tensor
    losses: tuple[float, ...]
    settled: bool  # whether it stopped because nothing changed, and not for want of sweeps


def masked_svd(
    problem: Matrix, rank: int, generator: torch.Generator, incoherence: float | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return U (rows, rank) and V (columns, rank) of the truncated SVD of P_Ω(M) / p, p the share of known entries.

    incoherence: a bound mu on the row norms of the true U, sqrt(mu² rank / rows) at most: entries of U beyond twice that are
    set to 0 and U is made orthonormal again. Too small a bound zeroes good rows, so there is none by default.
    Source: Jain, Netrapalli & Sanghavi (2013), arXiv:1212.0467, algorithm 1.
    """
    left, right = scales(problem)
    U, S, V = problem.leading(torch.ones_like(left), torch.ones_like(right), rank, generator)
    S = S / max(problem.density, torch.finfo(S.dtype).tiny)
    if incoherence is None:
        return U * S.sqrt(), V * S.sqrt()
    limit = 2 * incoherence * math.sqrt(rank / len(U))
    Q = torch.linalg.qr(torch.where(U.abs() > limit, 0.0, U))[0]
    return balanced(Q, V * S @ (U.T @ Q))


def scaled_svd(problem: Matrix, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return U (rows, rank) and V (columns, rank) of the best product in the norm of the nearest rank-one weights.

    Those are left² right²ᵀ; where the weights are of rank one this is the minimum itself. Source: Guo et al. (2024),
    LQ-LoRA, arXiv:2311.12023 (the scales), normalised here so that they multiply to weights of rank one.
    """
    left, right = scales(problem)
    U, S, V = problem.leading(left, right, rank, generator)
    return balanced(U * S / left[:, None], V / right[:, None])


def scales(problem: Matrix) -> tuple[Tensor, Tensor]:
    """Return left (rows,) and right (columns,), positive, whose squares' product has the weights' row and column means."""
    mean = problem.mean_weight
    row, column = problem.means()
    lowest = max(FLOOR * mean, torch.finfo(torch.float64).tiny)
    return row.clamp(min=lowest).sqrt(), (column.clamp(min=lowest) / max(mean, lowest)).sqrt()


def balanced(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same product U Vᵀ as orthogonal columns of equal norms, the root of its singular values, on both sides.

    Of all pairs with that product these have the least |U|² + |V|², which is what the ridge adds up.
    """
    (Qu, Ru), (Qv, Rv) = torch.linalg.qr(U), torch.linalg.qr(V)
    left, S, right = torch.linalg.svd(Ru @ Rv.T)
    root = S.sqrt()
    return Qu @ left * root, Qv @ right.T * root


def alternate(
    problem: Matrix,
    U: Tensor,
    V: Tensor,
    generator: torch.Generator,
    *,
    lsq: Lsq = "exact",
    ridge: float = 1e-10,
    sweeps: int = 50,
    tolerance: float = 1e-9,
) -> Fit:
    """Return U, V from half-steps that refit V for U, then U for V, until a sweep changes the error too little.

    U (rows, rank), V (columns, rank), float64, balanced: the start. The error is the root of the weighted squared error, and
    `tolerance` the fraction of it that a sweep has to change; an error of rounding, or of what the ridge leaves, is settled
    too. With weights W and the ridge as a
    fraction of mean(W) times the largest singular value of the start, the sum of W (M - U Vᵀ)² and that times
    |U|² + |V|² never grows, neither in exact half-steps nor in inexact ones, nor by the balancing after a sweep.
    Source: Jain, Netrapalli & Sanghavi (2013), arXiv:1212.0467; Gu et al. (2024), arXiv:2302.11068. Departures: every
    half-step uses all entries, no fresh part of them; the ridge.
    """
    absolute = ridge * problem.mean_weight * float(torch.linalg.matrix_norm(U, 2) * torch.linalg.matrix_norm(V, 2))
    energy = problem.loss(torch.zeros_like(U), V)
    shrunk = 4 * U.shape[1] * absolute**2 / problem.mean_weight  # every singular value by about absolute / mean weight
    nothing = max(ROUNDING * energy, min(EXACT * energy, shrunk))
    losses = [problem.loss(U, V)]
    settled = losses[-1] <= nothing
    while len(losses) <= sweeps and not settled:
        V = refitted(problem.T, U, V, absolute, lsq, generator)
        U = refitted(problem, V, U, absolute, lsq, generator)
        U, V = balanced(U, V)
        losses.append(problem.loss(U, V))
        before, after = math.sqrt(losses[-2]), math.sqrt(losses[-1])
        settled = losses[-1] <= nothing or abs(before - after) < tolerance * before
    return Fit(U, V, tuple(losses), settled)
