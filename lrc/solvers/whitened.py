"""Whitened SVD: the least output error on the calibration inputs (SVD-LLM, versions 1 and 2)."""

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lrc.solvers.base import Decomposition, Moments, Need, solver
from lrc.solvers.checks import check
from lrc.solvers.inputs import (
    InputsOptions,
    centers,
    cross_moment,
    input_mean,
    input_moment,
    output_mean,
    propagated_target,
)
from lrc.solvers.ladder import Root, root
from lrc.solvers.terms import balanced, ordered_terms, storage_dtype, stored

UNIT = "squared output error per token"


class WhitenedSolver(InputsOptions):
    """Least squares on the calibration inputs: the SVD of W L with L Lᵀ the inputs' second moment."""

    type: Literal["whitened"] = "whitened"
    variant: Literal["v1", "v2", "cholesky", "eigh"] = Field(
        default="v1", description="Root of the second moment: v1 = cholesky, v2 = eigh (works on singular moments too)."
    )
    damping: float = Field(default=0.0, ge=0, description="Added to the second moment's diagonal, of its mean.")
    update: Literal["none", "lstsq"] = Field(
        default="none", description="lstsq: refit B to the dense outputs on the propagated inputs, A held fixed."
    )
    needs: ClassVar[frozenset[Need]] = frozenset({Need.INPUTS})


@solver(WhitenedSolver)
def whitened(
    weight: Tensor,
    bias: Tensor | None,
    moments: Moments,
    max_rank: int,
    options: WhitenedSolver,
    generator: torch.Generator,
) -> Decomposition:
    """Return the terms that minimise E||W x - B A x||² over the calibration inputs, for every rank.

    weight: (out_features, in_features). S in output units: the loss at rank r is the mean squared output error per token
    (of the blended target, where inputs are propagated). Computed in float64. Raises SolverError on statistics that are
    missing, misshapen or not finite; a singular second moment is no error (see `lrc.solvers.ladder`).
    Source: Wang et al. (2025), SVD-LLM, arXiv:2403.07378 (v1), and SVD-LLM V2, arXiv:2503.12340 (v2). Departures: small
    eigenvalues are floored, not dropped; B A is formed as U Uᵀ W, which needs no inverse of L; the bias may carry the mean.
    """
    check(weight, bias, moments, max_rank, options.needs)
    center = centers(options, bias)
    C = input_moment(moments, center)
    L = root(C, "gram", options.damping, "eigh" if options.variant in ("v2", "eigh") else "cholesky")
    target = propagated_target(weight, moments, options.blend, center=center)
    cross = cross_moment(moments, center)
    if options.update == "lstsq" and cross is not None and L.weight > 0:
        terms = ordered_terms(target, None, L, min(weight.shape), torch.float64)
        terms = refit(terms.A, weight, cross, L, max_rank, storage_dtype(weight))
    else:
        terms = ordered_terms(target, None, L, max_rank, storage_dtype(weight))
    return with_bias(replace(terms, scale=L.weight, unit=UNIT, notes=L.notes), weight, bias, moments, center)


def with_bias(terms: Decomposition, weight: Tensor, bias: Tensor | None, moments: Moments, center: bool) -> Decomposition:
    """Return `terms` with the layer's bias, and with what the bias correction needs where inputs are centred."""
    if not center:
        return replace(terms, bias=bias)
    return replace(terms, bias=bias, mean=input_mean(moments), target=output_mean(weight, moments))


def refit(A: Tensor, weight: Tensor, cross: Tensor, L: Root, max_rank: int, dtype: torch.dtype) -> Decomposition:
    """Return the terms with the rows of A kept and every B[:, i] the least squares of W x on a_i x̃.

    A: (k, in_features), rows orthogonal in the metric C̃ = L Lᵀ, so each column of B is fitted alone and every truncation is
    the least squares of its rank. cross: E[x x̃ᵀ]. Terms are put in the order of the error that they take away.
    remainder: squared error left over beyond the terms, not counting what no map of x̃ can reach.
    """
    lengths = L.apply(A).norm(dim=1)
    usable = lengths > torch.finfo(torch.float64).tiny
    A = A / torch.where(usable, lengths, torch.ones_like(lengths))[:, None]
    Wc = weight.double() @ cross
    B = torch.where(usable, Wc @ A.T, torch.zeros_like(lengths))
    S = B.norm(dim=0)
    order = S.argsort(descending=True, stable=True)
    reachable = float(((L.divide(Wc)) * Wc).sum())
    B, A = balanced(B[:, order], A[order])
    terms = stored(B, A, S[order], max_rank, dtype, balance=False)
    return replace(terms, remainder=max(0.0, reachable - float(terms.S.square().sum())))
