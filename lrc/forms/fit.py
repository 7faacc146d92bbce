"""The best last factor behind a fixed first part, in the norm of a solver: a projection.

A first part is a basis Phi (q, in_features): what it does to a patch. The weights Z Phi with a free Z (out_features, q) are a
subspace, and with Phi L = Rᵀ Qᵀ the closest of them to T is T L Q R⁻ᵀ Phi, for any weighing of the outputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrc.solvers import Norm


@dataclass(frozen=True)
class Behind:
    """A target seen through a basis.

    Q: (in_features, q), orthonormal; its first columns span the first rows of the basis. R: (q, q), upper triangular.
    TQ: T L Q, (out_features, q). total: the squared norm of the target.
    """

    R: Tensor
    TQ: Tensor
    seen: Tensor  # Kᵀ T L Q
    total: float

    def losses(self) -> Tensor:
        """Return the squared error behind the first 0 … q rows of the basis, (q + 1,), non-negative."""
        energy = self.seen.square().sum(0).cumsum(0)
        return (self.total - torch.cat([energy.new_zeros(1), energy])).clamp(min=0)

    def last(self, rows: int) -> Tensor:
        """Return the best Z (out_features, rows) behind the first rows of the basis."""
        R = self.R[:rows, :rows]
        diagonal = R.diagonal().abs()
        if bool(diagonal.min() > 1e-10 * diagonal.max()):
            solved: Tensor = torch.linalg.solve_triangular(R.T, self.TQ[:, :rows], upper=False, left=False)
            return solved
        return self.TQ[:, :rows] @ torch.pinverse(R.T, rcond=1e-10)


def behind(norm: Norm, basis: Tensor) -> Behind:
    """Look at a target through a basis (q, in_features), q <= in_features."""
    right = norm.right
    T = norm.target if right is None else right.apply(norm.target)
    Y = basis if right is None else right.apply(basis)
    Q, R = torch.linalg.qr(Y.T)
    TQ = T @ Q
    left = norm.left
    seen, whole = (TQ, T) if left is None else (left.apply(TQ.T).T, left.apply(T.T).T)
    return Behind(R, TQ, seen, float(whole.square().sum()))


def marginal(norm: Norm, size: tuple[int, ...], kept: tuple[int, ...]) -> Tensor | None:
    """Return a root of the inputs' second moment along `kept` of (in_channels, *kernel), the mean over all others.

    Lower triangular, (k, k) with k the product of the kept sizes; None where inputs are not weighed.
    """
    if norm.right is None:
        return None
    L = norm.right.matrix
    C = torch.diag(L.square()) if L.ndim == 1 else L @ L.T
    inner = size[1:]
    others = [dim for dim in range(len(inner)) if dim not in kept]
    order = [*kept, *others]
    C = C.reshape(*inner, *inner).permute(*order, *(dim + len(inner) for dim in order))
    width = torch.Size([inner[dim] for dim in kept]).numel()
    C = C.reshape(width, -1, width, C.numel() // (width * width) // max(1, _numel(inner, others)))
    C = C.diagonal(dim1=1, dim2=3).mean(-1)
    C = (C + C.T) / 2
    C.diagonal().add_(1e-8 * C.diagonal().mean().clamp(min=torch.finfo(C.dtype).tiny))
    root, info = torch.linalg.cholesky_ex(C)
    return root if int(info) == 0 else torch.diag(C.diagonal().clamp(min=torch.finfo(C.dtype).tiny).sqrt())


def _numel(sizes: tuple[int, ...], dims: list[int]) -> int:
    return torch.Size([sizes[dim] for dim in dims]).numel()


def leading_rows(X: Tensor, root: Tensor | None) -> Tensor:
    """Return an orthonormal basis of rows, (k, n), whose first r rows span the best input side of X (rows, n) of rank r.

    root: of the second moment of what X reads, (n, n), or None.
    """
    M = X if root is None else X @ root
    vectors: Tensor = torch.linalg.eigh(M.T @ M)[1]
    rows = vectors.flip(1).T
    if root is not None:
        rows = torch.linalg.solve_triangular(root, rows, upper=False, left=False)
    orthonormal: Tensor = torch.linalg.qr(rows.T)[0].T
    return orthonormal
