"""The core that the exact solvers share: the best ordered terms of a weight seen through a norm on each side."""

from dataclasses import replace

import torch
from torch import Tensor

from lrc.solvers.base import Decomposition, Norm
from lrc.solvers.ladder import Root


def ordered_terms(weight: Tensor, left: Root | None, right: Root | None, max_rank: int, dtype: torch.dtype) -> Decomposition:
    """Return B, A, S such that B[:, :r] A[:r] minimises ||Kᵀ (W - B A) L||_F over all maps of rank r, for every r.

    weight: W (out_features, in_features). left: K with K Kᵀ weighing output errors, right: L weighing inputs; None stands
    for the identity. S: singular values of D = Kᵀ W L. dtype: of B, A and S as stored; float64 is computed with.

    The vectors are eigenvectors of the smaller Gram matrix of D (exact to eps * S[0]² / S[i]²), but S is measured as the
    norm of each projection, so the loss that S promises is true to rounding whatever the vectors are. The larger side
    follows by a product with W (U Uᵀ Kᵀ W: no inverse of L), which makes full rank reproduce W for a singular C too.
    """
    W = weight.double()
    KW = W if left is None else left.apply(W.T).T
    D = KW if right is None else right.apply(KW)
    if D.shape[0] <= D.shape[1]:
        U = eigenvectors(D @ D.T)
        S = (U.T @ D).norm(dim=1)
        U, S = _descending(U, S)
        A = U.T @ KW
        B = U if left is None else left.solve(U.T).T
    else:
        V = eigenvectors(D.T @ D)
        S = (D @ V).norm(dim=0)
        V, S = _descending(V, S)
        WL = W if right is None else right.apply(W)
        B = WL @ V
        A = V.T if right is None else right.solve(V.T)
    return replace(stored(B, A, S, max_rank, dtype), norm=Norm(W, left, right))


def stored(B: Tensor, A: Tensor, S: Tensor, max_rank: int, dtype: torch.dtype, *, balance: bool = True) -> Decomposition:
    """Return the first `max_rank` terms in `dtype`, and the squared norm of the rest.

    balance: give the two vectors of a term equal norms (the square-root split of the singular value, where the norm is
    Frobenius), so that neither factor overflows float16.
    """
    if balance:
        B, A = balanced(B, A)
    remainder = float(S[max_rank:].square().sum())
    B, A, S = B[:, :max_rank], A[:max_rank], S[:max_rank]
    return Decomposition(B.to(dtype).contiguous(), A.to(dtype).contiguous(), S.contiguous(), remainder)


def balanced(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same products with equal norms of B[:, i] and A[i]; a term with a zero side is left alone."""
    ratio = A.norm(dim=1) / B.norm(dim=0)
    usable = torch.isfinite(ratio) & (ratio > 0)
    root = torch.where(usable, ratio, torch.ones_like(ratio)).sqrt()
    return B * root, A / root[:, None]


def eigenvectors(gram: Tensor) -> Tensor:
    """Return the eigenvectors of a symmetric matrix as columns, largest eigenvalue first."""
    vectors: Tensor = torch.linalg.eigh(gram)[1]
    return vectors.flip(1)


def storage_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype that factors of `weight` are kept in: float64 for float64, float32 for all others."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def square_scale(weight: Tensor) -> float:
    """Return what to divide a weight by, lest its squares under- or overflow: 1 for all but unusual units."""
    low, high = torch.aminmax(weight)
    largest = max(-float(low), float(high))
    return 1.0 if largest == 0 or 1e-6 < largest < 1e6 else largest


def _descending(vectors: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    order = S.argsort(descending=True, stable=True)
    return vectors[:, order], S[order]
