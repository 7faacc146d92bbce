"""LR2VQ: the pieces of a weight in a few dimensions, and clustered there."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lrc.errors import SolverError
from lrc.solvers.base import Moments
from lrc.solvers.checks import check
from lrc.solvers.coded import Coded, CodedOptions, coded_solver
from lrc.solvers.kmeans import Clusters, kmeans
from lrc.solvers.terms import eigenvectors, storage_dtype


class Lr2vqSolver(CodedOptions):
    """Low-rank representations of pieces of a weight, stored as codes of a codebook; needs no calibration."""

    type: Literal["lr2vq"] = "lr2vq"
    iterations: int = Field(default=100, ge=0, description="Turns of k-means, at most.")
    choose: bool = Field(default=False, description="Take the dimension, at most `rank`, with the least error before training.")


@coded_solver(Lr2vqSolver)
def lr2vq(weight: Tensor, moments: Moments, rank: int, options: Lr2vqSolver, generator: torch.Generator) -> Coded:
    """Return V ≈ E[codes] P, V (N, m) the runs of m numbers of the rows of `weight` (out_features, in_features).

    Z P is the truncated SVD of V in `rank` dimensions, P with orthonormal rows; codewords E and codes are the k-means of the
    rows of Z. So the squared error of the weight is |V - Z P|² + |Z - E[codes]|²: the first falls with the dimension, the
    second grows. `choose` takes the dimension where the sum is least. Rank m is plain vector quantisation.
    Raises SolverError for an m that does not divide in_features and for a rank above m.
    Source: Zhu, Zhou & Zhong (2022), LR2VQ, arXiv:2211.11397; its training is `lrc.train.recipes.lr2vq`.
    """
    check(weight, None, moments, rank, options.needs)
    if weight.shape[1] % options.m:
        raise SolverError("m", expected=f"a divisor of in_features={weight.shape[1]}", got=str(options.m))
    if rank > options.m:
        raise SolverError("rank", expected=f"at most m={options.m}, the numbers of a piece", got=str(rank))
    V = weight.detach().reshape(-1, options.m).double()
    T = eigenvectors(V.T @ V)[:, :rank]
    Z = V @ T
    left = float((V - Z @ T.T).square().sum()), Z.square().sum(0)
    Z, P = Z.to(storage_dtype(weight)), T.T.to(storage_dtype(weight))
    if options.k is None:
        return Coded(Z, P, low_rank=left[0])
    dims = range(1 if options.choose else rank, rank + 1)
    best: tuple[float, int, Clusters] | None = None
    for d in dims:
        found = kmeans(Z[:, :d].contiguous(), options.k, options.iterations, generator)
        total = left[0] + float(left[1][d:].sum()) + found.history[-1]
        if best is None or total < best[0]:
            best = total, d, found
    assert best is not None, "there is at least one dimension"
    total, d, found = best
    clustering = found.history[-1]
    notes = (f"{d} of at most {rank} dimensions lose least",) if options.choose else ()
    return Coded(
        Z[:, :d].contiguous(), P[:d].contiguous(), found.codewords, found.codes, total - clustering, clustering, notes
    )  # fmt: skip


def orthonormal(coefficients: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return Z Rᵀ and Q with Z Rᵀ Q = Z P, Q (d, m) with orthonormal rows, for Z (n, d) and P (d, m); and Rᵀ (d, d).

    Distances between the new coefficients are distances between the pieces that they stand for.
    """
    Q, R = torch.linalg.qr(basis.T)
    signs = torch.where(R.diagonal() < 0, -1.0, 1.0).to(R.dtype)  # a basis that is orthonormal stays as it is
    Q, R = Q * signs, signs[:, None] * R
    return coefficients @ R.T, Q.T.contiguous(), R.T
