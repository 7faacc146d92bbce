"""Atomic feature mimicking: principal components of a layer's outputs, and LoRD, which is the same on a language model."""

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lrc.solvers.base import Decomposition, Moments, Need, Norm, SolverOptions, solver
from lrc.solvers.checks import check
from lrc.solvers.inputs import input_mean, input_moment, output_mean
from lrc.solvers.ladder import root
from lrc.solvers.terms import eigenvectors, storage_dtype, stored
from lrc.solvers.whitened import UNIT, with_bias

SUM = 1e-6  # how far from 1 the counts of a bag may be on average, and still count as shares


class AfmSolver(SolverOptions):
    """Principal components of the layer's outputs."""

    type: Literal["afm"] = "afm"
    center: bool = Field(
        default=True,
        description="Take the mean output out and keep it in the bias (adds a bias to a layer that has none).",
    )
    prior: float = Field(
        default=0.0,
        ge=0,
        description="Of embeddings: what all rows alike count beside the data, as a share of it; by 0 rows that the data never "
        "reads are not looked at.",
    )
    needs: ClassVar[frozenset[Need]] = frozenset({Need.INPUTS})


class LordSolver(SolverOptions):
    """LoRD: feature mimicking of a language model's linear layers, one shot."""

    type: Literal["lord"] = "lord"
    center: bool = Field(
        default=True,
        description="Take the mean output out and keep it in the bias (adds a bias to a layer that has none).",
    )
    needs: ClassVar[frozenset[Need]] = frozenset({Need.INPUTS})


@solver(AfmSolver)
def afm(
    weight: Tensor,
    bias: Tensor | None,
    moments: Moments,
    max_rank: int,
    options: AfmSolver,
    generator: torch.Generator,
) -> Decomposition:
    """Return the principal components of y = W x + b: ŷ = U_r U_rᵀ (y - E y) + E y.

    weight: (out_features, in_features). B = U orthonormal, A = Uᵀ W; S² the eigenvalues of the outputs' covariance, so the
    loss at rank r is the mean squared output error per token. Computed in float64 from the inputs' moments. Raises
    SolverError on statistics that are missing, misshapen or not finite.
    Source: Yu & Wu (2023), AAAI, doi:10.1609/aaai.v37i9.26304, and Yu et al. (2024), arXiv:2405.18146. Departures: the
    covariance of y is W C Wᵀ from that of x; the part of b inside U_r stays in the second bias; `prior`.
    """
    check(weight, bias, moments, max_rank, options.needs)
    return components(weight, bias, with_prior(moments, options.prior), max_rank, options.center)


def with_prior(moments: Moments, prior: float) -> Moments:
    """Return the moments of a table as if all its rows were read alike, too, `prior` times as often as the data reads."""
    if not prior or moments.gram is None or moments.gram.ndim != 1:
        return moments

    def blended(value: Tensor | None) -> Tensor | None:
        return None if value is None else (value.double() + prior * value.double().mean()) / (1 + prior)

    return replace(moments, gram=blended(moments.gram), mean=blended(moments.mean), dense_mean=blended(moments.dense_mean))


@solver(LordSolver)
def lord(
    weight: Tensor,
    bias: Tensor | None,
    moments: Moments,
    max_rank: int,
    options: LordSolver,
    generator: torch.Generator,
) -> Decomposition:
    """Return the same components as `afm`, under the name of the method for language models.

    Shapes, units and errors as for `afm`. Source: Kaushal, Vaidhya & Rish (2023), LoRD, arXiv:2309.14021. The paper leaves
    a layer dense whose rank does not shrink it; that is decided by `lrc.ranks`.
    """
    check(weight, bias, moments, max_rank, options.needs)
    return components(weight, bias, moments, max_rank, options.center)


def components(weight: Tensor, bias: Tensor | None, moments: Moments, max_rank: int, center: bool) -> Decomposition:
    """Return the principal components of the outputs, float64 inside: B = U, A = Uᵀ W, with the bias as the layer needs it."""
    W = weight.double()
    lookup = moments.gram is not None and moments.gram.ndim == 1
    notes: tuple[str, ...] = ()
    if lookup and center and abs(float(input_mean(moments).sum()) - 1) > SUM:
        center, notes = False, ("the mean output stays in: the counts of a bag do not sum to 1",)
    if lookup and center:  # one-hot vectors sum to 1: taking the mean off every row of the table centres the outputs
        W = W - output_mean(weight, moments)[:, None]
    L = root(input_moment(moments, center and not lookup), "gram", variant="eigh")
    D = L.apply(W)
    U = eigenvectors(D @ D.T) if D.shape[0] <= D.shape[1] else torch.linalg.svd(D, full_matrices=False)[0]
    S = (U.T @ D).norm(dim=1)
    order = S.argsort(descending=True, stable=True)
    U = U[:, order]
    terms = stored(U, U.T @ W, S[order], max_rank, storage_dtype(weight), balance=False)
    terms = replace(terms, scale=L.weight, unit=UNIT, notes=notes + L.notes, norm=Norm(W, None, L))
    return with_bias(terms, weight, bias, moments, center)
