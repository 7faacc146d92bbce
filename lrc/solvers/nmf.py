"""Factors without negative entries, found by multiplicative updates: NMF and semi-NMF, as Greenformers has them.

Both work on W over its largest entry, so that the small number which keeps a divisor from zero is small beside it. They
are not nested: the factors of one rank are no part of those of the next, so each rank is solved for anew.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lrc.errors import SolverError
from lrc.solvers.base import Decomposition, Moments, SolverOptions, solver
from lrc.solvers.checks import check
from lrc.solvers.ladder import root
from lrc.solvers.terms import balanced, storage_dtype

TINY = 1e-9  # added to divisors
SETTLED = 1e-10  # change of the error, over out_features, at which the updates end
Update = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # W, B, A -> B, A


class NonNegativeOptions(SolverOptions):
    """Options of the multiplicative updates."""

    num_iter: int = Field(default=10, ge=1, le=100_000, description="Updates of both factors, at most.")
    nested: ClassVar[bool] = False


class SnmfSolver(NonNegativeOptions):
    """Semi-nonnegative matrix factorization: B has no negative entry, A is free."""

    type: Literal["snmf"] = "snmf"


class NmfSolver(NonNegativeOptions):
    """Nonnegative matrix factorization: neither factor has a negative entry, and the weight may have none."""

    type: Literal["nmf"] = "nmf"


@solver(SnmfSolver)
def snmf(
    weight: Tensor,
    bias: Tensor | None,
    moments: Moments,
    max_rank: int,
    options: SnmfSolver,
    generator: torch.Generator,
) -> Decomposition:
    """Return W ≈ B A with B >= 0, of rank `max_rank` and no other; its error ||W - B A||² is at least that of the SVD.

    weight: (out_features, in_features). B starts at random; each update, the least squares of A and then a step of B, never
    raises the error. Computed in float64. Raises SolverError on values that are not finite.
    Source: Ding, Li & Jordan (2010), doi:10.1109/TPAMI.2008.277, with X = Wᵀ, F = Aᵀ, G = B; as applied to layers by
    Cahyawijaya (2021), Greenformers, arXiv:2108.10808. Departures: a singular Bᵀ B is no error (see `lrc.solvers.ladder`);
    A is fitted once more to the last B, which only lowers the error.
    """
    check(weight, bias, moments, max_rank, options.needs)

    def fitted(W: Tensor, B: Tensor) -> Tensor:
        return root(B.T @ B, "B'B").divide(W.T @ B).T

    def update(W: Tensor, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        A = fitted(W, B)
        drawn, held = W @ A.T, A @ A.T
        up = drawn.clamp(min=0) + B @ (-held).clamp(min=0)
        down = (-drawn).clamp(min=0) + B @ held.clamp(min=0)
        return B * (up / (down + TINY)).sqrt(), A

    W, unit = _in_units(weight)
    B = _updated(W, *_start(W, max_rank, generator), update, options.num_iter)[0]
    return _terms(weight, bias, B, fitted(W, B) * unit)


@solver(NmfSolver)
def nmf(
    weight: Tensor,
    bias: Tensor | None,
    moments: Moments,
    max_rank: int,
    options: NmfSolver,
    generator: torch.Generator,
) -> Decomposition:
    """Return W ≈ B A with B >= 0 and A >= 0, of rank `max_rank` and no other, for a weight without negative entries.

    weight: (out_features, in_features). Both start at random, scaled to the weight; no update raises the error ||W - B A||².
    Computed in float64. Raises SolverError on negative values and on values that are not finite.
    Source: Lee & Seung (2000), Algorithms for non-negative matrix factorization, NIPS 13, theorem 1, with V = Wᵀ, W = Aᵀ,
    H = Bᵀ; as applied to layers by Cahyawijaya (2021), Greenformers, arXiv:2108.10808. Departure: the two sides of a term
    get equal norms, where the code of Greenformers normalizes one side and leaves the other as it is.
    """
    check(weight, bias, moments, max_rank, options.needs)
    negative = int((weight < 0).sum())
    if negative:
        raise SolverError(
            "weight",
            expected="no negative entry",
            got=f"{negative} negative of {weight.numel()} values",
            hint="Choose the solver `snmf`, whose first factor may be negative.",
        )

    def update(W: Tensor, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        B = B * (W @ A.T) / (B @ (A @ A.T) + TINY)
        return B, A * (B.T @ W) / (B.T @ B @ A + TINY)

    W, unit = _in_units(weight)
    B, A = _start(W, max_rank, generator)
    BA = B @ A
    B, A = _updated(W, B, A * float((W * BA).sum() / BA.square().sum()), update, options.num_iter)
    return _terms(weight, bias, B, A * unit)


def _in_units(weight: Tensor) -> tuple[Tensor, float]:
    """Return the weight over its largest entry, float64, and that entry; 1 for a weight of zeros."""
    W = weight.double()
    unit = float(W.abs().max()) or 1.0
    return W / unit, unit


def _start(W: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return B (out_features, rank) and A (rank, in_features), uniform in [0, 1) and away from zero, which updates keep."""
    B, A = (torch.rand(size, generator=generator, dtype=W.dtype) for size in ((W.shape[0], rank), (rank, W.shape[1])))
    return B.to(W.device) + 1e-4, A.to(W.device) + 1e-4


def _updated(W: Tensor, B: Tensor, A: Tensor, update: Update, times: int) -> tuple[Tensor, Tensor]:
    """Return the factors after so many updates, or once the error has settled."""
    before = float("inf")
    for _ in range(times):
        B, A = update(W, B, A)
        error = float((W - B @ A).norm())
        if before - error < SETTLED * W.shape[0]:
            break
        before = error
    return B, A


def _terms(weight: Tensor, bias: Tensor | None, B: Tensor, A: Tensor) -> Decomposition:
    """Return the factors as terms of one rank, largest first, so that the loss at no and at all terms is the true one.

    Terms overlap, so what B A explains is shared among them by their own norms; the losses between are no promise.
    """
    norms = B.norm(dim=0) * A.norm(dim=1)
    order = norms.argsort(descending=True, stable=True)
    B, A = balanced(B[:, order], A[order])
    W = weight.double()
    remainder = float((W - B @ A).square().sum())
    explained = max(0.0, float(W.square().sum()) - remainder)
    shares = norms[order] / norms.norm().clamp(min=torch.finfo(norms.dtype).tiny)
    dtype = storage_dtype(weight)
    return replace(
        Decomposition(B.to(dtype).contiguous(), A.to(dtype).contiguous(), shares * explained**0.5, remainder), bias=bias
    )
