"""Activation-aware and Fisher-weighted SVD: plain SVD after the columns of the weight are scaled by what they matter."""

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lrc.errors import SolverError
from lrc.solvers.base import Decomposition, Moments, Need, SolverOptions, solver
from lrc.solvers.checks import check
from lrc.solvers.fisher import FisherOptions
from lrc.solvers.ladder import FLOOR
from lrc.solvers.terms import storage_dtype, stored

SHIFT = 1e-6  # keeps the scale of a dead input above zero


class AsvdSolver(SolverOptions):
    """Activation-aware SVD: the SVD of the weight, its columns scaled by the magnitudes of their inputs."""

    type: Literal["asvd"] = "asvd"
    alpha: float = Field(
        default=0.5, ge=0, le=1, description="Power of the mean absolute input that a column is scaled by; 0 is plain SVD."
    )
    needs: ClassVar[frozenset[Need]] = frozenset({Need.MAGNITUDES})


class FwsvdSolver(FisherOptions):
    """Fisher-weighted SVD: the SVD of the weight, its columns scaled by the Fisher information of their entries."""

    type: Literal["fwsvd"] = "fwsvd"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.WEIGHT_FISHER})


@solver(AsvdSolver)
def asvd(
    weight: Tensor,
    bias: Tensor | None,
    moments: Moments,
    max_rank: int,
    options: AsvdSolver,
    generator: torch.Generator,
) -> Decomposition:
    """Return the terms that minimise ||(W - B A) diag(t)||_F, t = (mean |x|)**alpha + 1e-6, for every rank.

    weight: (out_features, in_features). The loss at rank r is that norm squared. Computed in float64. Raises SolverError on
    statistics that are missing, misshapen, negative or not finite.
    Source: Yuan et al. (2023), ASVD, arXiv:2312.05821, with S_ii = t_i. Departures: the mean over samples in place of
    their sum, so that t does not depend on how many there are; an exact SVD in place of a random one.
    """
    check(weight, bias, moments, max_rank, options.needs)
    magnitudes = _not_negative(moments.magnitudes, "moments.magnitudes")
    terms = scaled_terms(weight, magnitudes**options.alpha + SHIFT, max_rank)
    return replace(terms, bias=bias, unit="squared weight error scaled by input magnitudes")


@solver(FwsvdSolver)
def fwsvd(
    weight: Tensor,
    bias: Tensor | None,
    moments: Moments,
    max_rank: int,
    options: FwsvdSolver,
    generator: torch.Generator,
) -> Decomposition:
    """Return the terms that minimise ||(W - B A) diag(d)||_F, d_j² = sum over i of weight_fisher[i, j], for every rank.

    weight: (out_features, in_features). The loss at rank r is that norm squared; where weight_fisher does not vary along
    out_features, it is out_features times the error weighed by weight_fisher entry by entry. Computed in float64. Raises
    SolverError on statistics that are missing, misshapen, negative or not finite.
    Source: Hsu et al. (2022), FWSVD, arXiv:2207.00112, where weights are (in_features, out_features) and rows are scaled.
    Departure: columns without information get the least weight that the others leave visible, and a note says so.
    """
    check(weight, bias, moments, max_rank, options.needs)
    information = _not_negative(moments.weight_fisher, "moments.weight_fisher").sum(0)
    unit = "squared weight error scaled by Fisher information"
    largest = float(information.max())
    if largest == 0:
        note = "weight_fisher is zero: the loss does not see this layer, and its errors are not weighed"
        terms = scaled_terms(weight, torch.ones_like(information), max_rank)
        return replace(terms, bias=bias, unit=unit, scale=0.0, notes=(note,))
    floor = FLOOR * largest
    low = int((information < floor).sum())
    notes = (f"weight_fisher is nothing for {low} of {len(information)} inputs: floor {FLOOR:g}",) if low else ()
    return replace(scaled_terms(weight, information.clamp(min=floor).sqrt(), max_rank), bias=bias, unit=unit, notes=notes)


def scaled_terms(weight: Tensor, scale: Tensor, max_rank: int) -> Decomposition:
    """Return B, A, S such that B[:, :r] A[:r] minimises ||(W - B A) diag(scale)||_F over all maps of rank r, for every r.

    scale: positive, float64 (in_features,). With U S Vᵀ = W diag(scale), S_r Vᵀ_r / scale is Uᵀ_r W: nothing is divided by
    small scales, and full rank reproduces W. The two sides of a term have equal norms.
    """
    W = weight.double()
    U, S, _ = torch.linalg.svd(W * scale, full_matrices=False)
    return stored(U, U.T @ W, S, max_rank, storage_dtype(weight))


def _not_negative(statistic: Tensor | None, name: str) -> Tensor:
    """Return a statistic in float64. Raises SolverError where it was not measured, or is negative."""
    if statistic is None or bool((statistic < 0).any()):
        got = "none" if statistic is None else f"{int((statistic < 0).sum())} negative of {statistic.numel()} values"
        raise SolverError(name, expected="numbers that are not negative", got=got)
    return statistic.double()
