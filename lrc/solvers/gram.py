"""The singular value decomposition by the eigenvectors of the smaller Gram matrix."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from lrc.solvers.base import Decomposition, Moments, SolverOptions, solver
from lrc.solvers.checks import check
from lrc.solvers.terms import ordered_terms, storage_dtype


class GramSolver(SolverOptions):
    """Singular value decomposition by eigh of the smaller Gram matrix: faster than `svd`, blind to the smallest values."""

    type: Literal["gram"] = "gram"


@solver(GramSolver)
def gram(
    weight: Tensor,
    bias: Tensor | None,
    moments: Moments,
    max_rank: int,
    options: GramSolver,
    generator: torch.Generator,
) -> Decomposition:
    """Return the terms of the truncated SVD from eigh(W Wᵀ) or eigh(Wᵀ W), whichever is smaller, in float64.

    Directions whose singular value is under 1e-8 of the largest are mixed with each other; the losses stay exact, because
    they are measured by projection. weight: (out_features, in_features). Raises SolverError on values not finite.
    Source: Golub & Van Loan, Matrix Computations (4th ed., 2013), section 8.6.
    """
    check(weight, bias, moments, max_rank, options.needs)
    return replace(ordered_terms(weight, None, None, max_rank, storage_dtype(weight)), bias=bias)
