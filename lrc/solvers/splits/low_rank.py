"""The low-rank step of alternating splitters: the best product at first, then warm steps."""

import torch
from torch import Tensor

from lrc.solvers.terms import eigenvectors


class LowRank:
    """The approximation of rank `rank` of a matrix that changes a little from call to call.

    The first call is the best one (Eckart and Young). A later call starts from the columns of the one before and makes `steps`
    steps of alternating least squares, B then A, which never increase the error: products in place of a decomposition.
    """

    def __init__(self, rank: int, steps: int = 1) -> None:
        self.rank = rank
        self.steps = steps
        self._columns: Tensor | None = None

    def __call__(self, X: Tensor) -> Tensor:
        """Return the approximation of X (m, n), float64."""
        B, A = self.factors(X)
        return B @ A

    def factors(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Return B (m, rank) with orthonormal columns and A = Bᵀ X (rank, n)."""
        if self.rank == 0:
            return X[:, :0], X[:0]
        columns = self._columns
        if columns is None:
            columns = leading_columns(X, self.rank)
        else:
            for _ in range(self.steps):
                columns = torch.linalg.qr(X @ (X.T @ columns)).Q
        self._columns = columns
        return columns, columns.T @ X


def leading_columns(X: Tensor, rank: int) -> Tensor:
    """Return the `rank` leading left singular vectors of X (m, n), float64, by the smaller Gram matrix."""
    m, n = X.shape
    if m <= n:
        return _leading(X @ X.T, rank)
    columns: Tensor = torch.linalg.qr(X @ _leading(X.T @ X, rank)).Q
    return columns


def _leading(gram: Tensor, rank: int) -> Tensor:
    vectors = eigenvectors(gram)
    strength = (gram @ vectors).norm(dim=0)
    return vectors[:, strength.argsort(descending=True, stable=True)[:rank]]


def balanced_factors(B: Tensor, A: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the same product with the square roots of its singular values on either side, in `dtype`.

    B: orthonormal columns (m, rank); A: (rank, n).
    """
    if B.shape[1] == 0:
        return B.to(dtype), A.to(dtype)
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    root = S.sqrt()
    return (B @ U * root).to(dtype).contiguous(), (root[:, None] * Vh).to(dtype).contiguous()
