"""Dobi-SVD: a layer's outputs truncated in their own principal directions."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from lrc.solvers.afm import components
from lrc.solvers.base import Decomposition, Moments, Need, SolverOptions, solver
from lrc.solvers.checks import check


class DobiSolver(SolverOptions):
    """Truncated activations: the weight projected on the principal directions of its outputs, ranks learned by default."""

    type: Literal["dobi"] = "dobi"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.INPUTS})
    shares: ClassVar[str] = "learned"


@solver(DobiSolver)
def dobi(
    weight: Tensor,
    bias: Tensor | None,
    moments: Moments,
    max_rank: int,
    options: DobiSolver,
    generator: torch.Generator,
) -> Decomposition:
    """Return the terms of V Vᵀ W, V the principal directions of y = W x over the calibration inputs, not centred.

    weight: (out_features, in_features). B = V orthonormal, A = Vᵀ W; S² the eigenvalues of E[y yᵀ] without the bias, so the
    loss at rank r is the mean squared output error per token: the least one there is, that of `whitened`. Computed in
    float64. Raises SolverError on statistics that are missing, misshapen or not finite.
    Source: Wang et al. (2025), Dobi-SVD, ICLR, arXiv:2502.02723: W' = V_k V_kᵀ W. Departures: V comes from W C Wᵀ, the
    second moment of all outputs at once, where the paper merges truncated bases batch by batch (incremental PCA); its
    quantised storage of the factors is a matter of the form, not of the solver. Its learned k is `lrc.ranks.learned`.
    """
    check(weight, bias, moments, max_rank, options.needs)
    return components(weight, bias, moments, max_rank, center=False)
