"""Weighted and masked low-rank approximation by alternating least squares."""

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lrc.errors import SolverError
from lrc.solvers.alternating import Fit, Matrix, alternate, masked_svd, scaled_svd, scales
from lrc.solvers.base import Decomposition, Moments, Need, SolverOptions, solver
from lrc.solvers.checks import check
from lrc.solvers.elementwise import Elementwise
from lrc.solvers.entries import Entries
from lrc.solvers.halfstep import Lsq
from lrc.solvers.terms import square_scale, storage_dtype, stored

SPARSE = 0.15  # share of entries up to which products with the entries alone are faster than dense ones
UNREACHED = "no entry has a weight: all count the same, and errors are not weighed"
UNITS = {
    "fisher": "squared weight error weighed by its Fisher information",
    "nonzero": "squared error of the nonzero weights",
    "none": "squared weight error",
}


class AltminSolver(SolverOptions):
    """Alternating least squares with a weight for every entry of W; the terms at one rank are not those of another."""

    type: Literal["altmin"] = "altmin"
    weights: Literal["fisher", "nonzero", "none"] = Field(
        default="fisher",
        description="What an entry's error counts: its Fisher information; 1, or 0 where the weight is exactly zero, which is "
        "taken for unknown and filled in; or 1 for all, which is the truncated SVD.",
    )
    init: Literal["auto", "svd", "masked_svd"] = Field(
        default="auto",
        description="Where the sweeps start: the SVD scaled by the weights' row and column means, or that of the known "
        "entries over their share; auto: masked_svd for `weights: nonzero`, else svd.",
    )
    lsq: Lsq = Field(
        default="exact",
        description="How a factor is refitted: by normal equations, or by conjugate gradients behind a sketch, whose time "
        "grows more slowly with the rank; up to rank 64 the first is faster.",
    )
    ridge: float = Field(
        default=1e-10,
        ge=0,
        description="What every singular value is shrunk by, of the largest: keeps rows with few entries finite.",
    )
    damping: float = Field(
        default=0.0,
        ge=0,
        description="Added to the weight of every entry, of their mean: keeps entries that seem to count for nothing near what "
        "they are; with `weights: nonzero` it pulls what is filled in towards zero.",
    )
    sweeps: int = Field(default=50, ge=1, description="How often both factors are refitted at most.")
    tolerance: float = Field(
        default=1e-6, ge=0, description="Stop once a sweep changes the weighted error by less than this fraction of it."
    )
    leading: ClassVar[bool] = True  # it fits the rank that is asked for
    nested: ClassVar[bool] = False  # and no other: not for a budget that is shared once the terms are known

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]  # the one solver whose needs depend on an option
        """What must be measured: the Fisher information, where it weighs."""
        return frozenset({Need.WEIGHT_FISHER}) if self.weights == "fisher" else frozenset()


@solver(AltminSolver)
def altmin(
    weight: Tensor,
    bias: Tensor | None,
    moments: Moments,
    max_rank: int,
    options: AltminSolver,
    generator: torch.Generator,
) -> Decomposition:
    """Return B A of rank `max_rank` with the least sum of Ω (W - B A)², Ω >= 0 elementwise, up to a local minimum.

    weight: (out_features, in_features). Computed in float64. Terms are those of an SVD of the product in the norm of the
    rank-one weights nearest to Ω. The losses at rank 0 and `max_rank` are measured; between them they are shared out by the
    squares of its singular values, and the first terms are not the best of their rank: ask for the rank that you want.
    Where Ω has rank one the SVD is the minimum, and there is no sweep. Raises SolverError on weights, or a Fisher
    information, that are missing, misshapen, negative or not finite.
    Source: Jain, Netrapalli & Sanghavi (2013), arXiv:1212.0467; Gu, Song, Yin & Zhang (2024), arXiv:2302.11068;
    Song, Ye, Yin & Zhang (2023), arXiv:2306.04169 (weights).
    """
    check(weight, bias, moments, max_rank, options.needs)
    omega, notes = weights_of(weight, moments, options)
    scale, level = square_scale(weight), float(omega.mean())
    W, Omega = weight.double() / scale, omega / level
    sparse = options.weights == "nonzero" and float((omega > 0).double().mean()) <= SPARSE
    problem: Matrix = Entries.of(W, Omega) if sparse else Elementwise(W, Omega)
    fit = fitted(problem, min(max_rank, *weight.shape), options, generator, notes)
    terms, root = ordered(problem, fit, storage_dtype(weight)), scale**0.5
    return replace(
        terms,
        B=(terms.B * root).to(weight.device),
        A=(terms.A * root).to(weight.device),
        S=(terms.S * scale).to(weight.device),
        remainder=terms.remainder * scale**2,
        scale=0.0 if UNREACHED in notes else level,
        unit=UNITS[options.weights],
        bias=bias,
        notes=tuple(notes),
    )


def weights_of(weight: Tensor, moments: Moments, options: AltminSolver) -> tuple[Tensor, list[str]]:
    """Return Ω, float64, of the weight's shape, not all zero, and notes on it."""
    omega = torch.ones_like(weight, dtype=torch.float64)
    if options.weights == "nonzero":
        omega = (weight != 0).double()
    elif options.weights == "fisher":
        assert moments.weight_fisher is not None  # checked
        omega = moments.weight_fisher.to(weight.device, torch.float64)
        if bool((omega < 0).any()):
            negative = int((omega < 0).sum())
            raise SolverError("moments.weight_fisher", expected="numbers >= 0", got=f"{negative} negative of {omega.numel()}")
    if not bool((omega > 0).any()):
        return torch.ones_like(omega), [UNREACHED]
    if options.damping > 0:
        return omega + options.damping * omega.mean(), []
    notes = [
        f"{count} of {len(known)} {side} have no entry with a weight: the product is 0 there"
        for side, known in (("outputs", (omega > 0).any(1)), ("inputs", (omega > 0).any(0)))
        if (count := int((~known).sum()))
    ]
    return omega, notes


def fitted(problem: Matrix, rank: int, options: AltminSolver, generator: torch.Generator, notes: list[str]) -> Fit:
    """Return the product, and add a note on how it was found."""
    if problem.is_rank_one(*scales(problem)):
        U, V = scaled_svd(problem, rank, generator)
        notes.append("weights of rank one: the scaled SVD is the minimum")
        return Fit(U, V, (problem.loss(U, V),), True)
    masked = options.weights == "nonzero" if options.init == "auto" else options.init == "masked_svd"
    U, V = (masked_svd if masked else scaled_svd)(problem, rank, generator)
    fit = alternate(
        problem, U, V, generator, lsq=options.lsq, ridge=options.ridge, sweeps=options.sweeps, tolerance=options.tolerance
    )
    end = "settled" if fit.settled else "not settled"
    notes.append(f"{len(fit.losses) - 1} sweeps over {problem.density:.1%} of the entries, {end}")
    return fit


def ordered(problem: Matrix, fit: Fit, dtype: torch.dtype) -> Decomposition:
    """Return the product as terms, by its SVD in the norm of the nearest rank-one weights."""
    left, right = scales(problem)
    (Qu, Ru), (Qv, Rv) = torch.linalg.qr(left[:, None] * fit.U), torch.linalg.qr(right[:, None] * fit.V)
    X, S, Yh = torch.linalg.svd(Ru @ Rv.T)
    remainder = fit.losses[-1]
    taken = max(0.0, problem.loss(torch.zeros_like(fit.U), fit.V) - remainder)
    total = float(S.square().sum())
    shares = S * (taken / total) ** 0.5 if total > 0 else S
    terms = stored((Qu @ X * S) / left[:, None], (Qv @ Yh.T / right[:, None]).T, shares, len(S), dtype)
    return replace(terms, remainder=remainder)
