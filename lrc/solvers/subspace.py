"""Subspaces as matrices of rows: products, orthonormal bases, Ritz vectors and random starts, written for many columns."""

import math

import torch
from torch import Tensor

NONZEROS = 8  # per column of a sparse sketch


def row_gram(X: Tensor, least: int = 256) -> Tensor:
    """Return X Xᵀ, one triangle computed and mirrored: near half the work of the product."""
    gram = X.new_empty(X.shape[0], X.shape[0])
    parts = [(0, X.shape[0])]
    while parts:
        low, high = parts.pop()
        if high - low <= least:
            torch.mm(X[low:high], X[low:high].T, out=gram[low:high, low:high])
            continue
        middle = (low + high) // 2
        torch.mm(X[low:middle], X[middle:high].T, out=gram[low:middle, middle:high])
        gram[middle:high, low:middle] = gram[low:middle, middle:high].T
        parts += [(low, middle), (middle, high)]
    return gram


def orthonormal(X: Tensor, *, exactly: bool = False) -> Tensor:
    """Return orthonormal rows with the span of X's: by Cholesky in its dtype, else in float64, else by Householder.

    exactly: at once in float64; else rows may be a hundredth off.
    """
    for dtype in dict.fromkeys((torch.float64 if exactly else X.dtype, torch.float64)):
        L, info = torch.linalg.cholesky_ex(row_gram(X.to(dtype)))
        pivots = L.diagonal()
        if not int(info) and float(pivots.min()) > 20 * math.sqrt(torch.finfo(dtype).eps) * float(pivots.max()):
            return solved(L.to(X.dtype), X)
    Q: Tensor = torch.linalg.qr(X.T)[0]
    return Q.T.contiguous()


def solved(L: Tensor, X: Tensor) -> Tensor:
    """Return L⁻¹X for a lower triangular L, from the right: as rows lie in memory, so that nothing is copied."""
    transposed: Tensor = torch.linalg.solve_triangular(L.T, X.T, upper=True, left=False)
    return transposed.T


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
    H = solved(L, solved(L, row_gram(images)).T)
    wide = float(H.diagonal().min()) < 1e-3 * float(H.diagonal().max())
    vectors = torch.linalg.eigh(H.double() if wide else H)[1].T.flip(0).to(H.dtype)
    if not wide:
        vectors = solved(torch.linalg.cholesky(row_gram(vectors)), vectors)
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
