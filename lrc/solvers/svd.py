"""The truncated singular value decomposition, exact, on the weight alone."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from lrc.solvers.base import Decomposition, Moments, Norm, SolverOptions, solver
from lrc.solvers.checks import check
from lrc.solvers.terms import storage_dtype, stored


class SvdSolver(SolverOptions):
    """Exact singular value decomposition of the weight; needs no calibration."""

    type: Literal["svd"] = "svd"


@solver(SvdSolver)
def svd(
    weight: Tensor,
    bias: Tensor | None,
    moments: Moments,
    max_rank: int,
    options: SvdSolver,
    generator: torch.Generator,
) -> Decomposition:
    """Return the terms of W = U S Vᵀ with the root of S on either side, computed in float64.

    weight: (out_features, in_features); S in the weight's unit. Raises SolverError on values that are not finite.
    Source: Eckart & Young (1936), doi:10.1007/BF02288367: truncation is the best rank-r map in the Frobenius norm.
    """
    check(weight, bias, moments, max_rank, options.needs)
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    root = S.sqrt()
    terms = stored(U * root, root[:, None] * Vh, S, max_rank, storage_dtype(weight), balance=False)
    return replace(terms, bias=bias, norm=Norm(weight.double()))
