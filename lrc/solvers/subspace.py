"""Subspaces as matrices of rows: products, orthonormal bases, Ritz vectors and random starts, written for many columns."""

import torch
from torch import Tensor

NONZEROS = 8  # per column of a sparse sketch


def row_gram(X: Tensor, blocks: int = 16) -> Tensor:
    """Return X Xᵀ, one triangle computed and mirrored: near half the work of the product."""
    size = X.shape[0]
    if size <= 16 * blocks:
        return X @ X.T
    gram, step = X.new_empty(size, size), -(-size // blocks)
    for i in range(0, size, step):
        gram[i : i + step, i:] = X[i : i + step] @ X[i:].T
        gram[i + step :, i : i + step] = gram[i : i + step, i + step :].T
    return gram


def orthonormal(X: Tensor) -> Tensor:
    """Return orthonormal rows with the span of X's: Cholesky in float64, Householder where X is near singular."""
    L, info = torch.linalg.cholesky_ex(row_gram(X.double()))
    pivots = L.diagonal()
    if int(info) or not float(pivots.min()) > 1e-7 * float(pivots.max()):
        Q: Tensor = torch.linalg.qr(X.T)[0]
        return Q.T.contiguous()
    rows: Tensor = torch.linalg.solve_triangular(L.to(X.dtype), X, upper=False)
    return rows


def without(X: Tensor, A: Tensor) -> Tensor:
    """Return the rows of X less their part in the span of A's orthonormal rows; twice, for what rounding leaves."""
    for _ in range(2):
        X = X - (X @ A.T) @ A
    return X


def ritz(basis: Tensor, images: Tensor) -> Tensor:
    """Return C with C @ basis the Ritz vectors of WᵀW, largest first; basis: near orthonormal rows, images: basis Wᵀ.

    Found in float64 where values span orders of magnitude: eigh is accurate to eps of the largest, and mixes those below.
    Its vectors are made orthonormal again, since eigh in float32 leaves them 1e-5 off.
    """
    L = torch.linalg.cholesky(row_gram(basis))
    half = torch.linalg.solve_triangular(L, row_gram(images), upper=False)
    H = torch.linalg.solve_triangular(L, half.T, upper=False)
    wide = float(H.diagonal().min()) < 1e-3 * float(H.diagonal().max())
    vectors = torch.linalg.eigh(H.double() if wide else H)[1].T.flip(0).to(H.dtype)
    vectors = torch.linalg.solve_triangular(torch.linalg.cholesky(row_gram(vectors)), vectors, upper=False)
    C: Tensor = torch.linalg.solve_triangular(L, vectors, upper=False, left=False)
    return C


def sparse_signs(rows: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Return a sparse sketch (rows, columns) with NONZEROS signs in each column."""
    shape, device = (NONZEROS, like.shape[1]), generator.device
    index = torch.stack([torch.randperm(shape[1], generator=generator, device=device) for _ in range(NONZEROS)]) % rows
    signs = torch.randint(2, shape, generator=generator, device=device).to(like.dtype) * 2 - 1
    place = torch.stack([index, torch.arange(shape[1], device=device).expand(shape)]).flatten(1)
    return torch.sparse_coo_tensor(place, signs.flatten(), (rows, shape[1]), check_invariants=True).to(like.device)


def normal(rows: int, columns: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Return standard normal rows, drawn where the generator is and moved to where `like` is."""
    drawn = torch.randn(rows, columns, generator=generator, dtype=like.dtype, device=generator.device)
    return drawn.to(like.device)
