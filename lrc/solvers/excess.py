"""How far terms that were found are at most above the best ones of their rank, from a few random products."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lrc.solvers.base import Decomposition, Norm
from lrc.solvers.subspace import normal, without
from lrc.solvers.terms import square_scale, storage_dtype, stored

PROBES, STARTS, STEPS = 8, 4, 6  # of the bound: samples of a trace, random starts for a norm, Lanczos steps from each
ROUNDING = 8.0  # eps ||W||_F², by which a measured squared error may be off


@dataclass(frozen=True)
class Found:
    """Terms of a tall W (rows, columns), largest first.

    A: (rank, columns), orthonormal. images: A Wᵀ, (rank, rows). energies: their squared norms, float64. total: ||W||_F².
    """

    A: Tensor
    images: Tensor
    energies: Tensor
    total: float

    @property
    def remainder(self) -> float:
        """The squared Frobenius error of all terms together."""
        return max(0.0, self.total - float(self.energies.sum()))

    @property
    def rounding(self) -> float:
        """What the remainder may be off by."""
        return ROUNDING * torch.finfo(self.A.dtype).eps * self.total

    def coarse(self, tolerance: float) -> bool:
        """Return whether rounding alone may hide an excess of `tolerance`."""
        return self.rounding > tolerance * self.remainder

    def terms(self, weight: Tensor) -> Decomposition:
        """Return the terms of the weight that W is the tall form of."""
        scale = square_scale(weight)
        B, A = self.images.T * math.sqrt(scale), self.A * math.sqrt(scale)
        if weight.shape[0] < weight.shape[1]:
            B, A = A.T, B.T
        terms = stored(B, A, self.energies.sqrt() * scale, len(self.energies), storage_dtype(weight))
        return replace(terms, remainder=self.remainder * scale**2, norm=Norm(weight.double()))


def measured(W: Tensor, A: Tensor, images: Tensor) -> Found:
    """Return the orthonormal rows A and their images A Wᵀ as terms, in the order of the energy that they capture."""
    energies = torch.linalg.vector_norm(images, dim=1).double().square()
    total = float(torch.linalg.vector_norm(W, dim=1).double().square().sum())
    if bool((energies[1:] > energies[:-1]).any()):
        order = energies.argsort(descending=True, stable=True)
        A, images, energies = A[order], images[order], energies[order]
    return Found(A, images, energies, total)


def excess(W: Tensor, gram: Tensor, found: Found, generator: torch.Generator) -> float:
    """Return an upper bound on how far the error of all terms is above the least of that rank, as a fraction; inf if none.

    W: (rows, columns), tall. With P = I - AᵀA, E = P WᵀW Aᵀ, C = P WᵀW P and A WᵀW Aᵀ = diag(energies): no rank captures
    more than rank t + tr(WᵀW - t I)₊ for any t (Fan), and for t > ||C||₂ the matrix WᵀW - t I is at most
    diag(energies) - t I + Eᵀ(t I - C)⁻¹E on the terms, and at most 0 beside them (Schur complement). So the terms miss at
    most sum (t - energies)₊ + tr Eᵀ(t I - C)⁻¹E, minimised over t. The trace is the mean over random z of
    (Ez)ᵀ(t I - C)⁻¹(Ez), plus three standard errors, each from above by Gauss-Radau quadrature. ||C||₂ is the largest Ritz
    value from random starts and from Ez, plus its residual.
    Source: Fan (1949), doi:10.1073/pnas.35.11.652; Golub & Meurant (2010), Matrices, Moments and Quadrature, chapter 6;
    Zhou & Li (2011), doi:10.1016/j.laa.2010.06.034 (the norm).
    """
    rank, columns = found.A.shape
    starts = torch.cat([normal(PROBES, rank, W, generator) @ found.images @ W, normal(STARTS, columns, W, generator)])
    T, last, norms = _lanczos(gram, found.A, starts)
    nodes, vectors = torch.linalg.eigh(T)
    norm = 1.001 * float((nodes + (last[:, None] * vectors[:, -1]).abs()).max())
    norm += torch.finfo(W.dtype).eps * math.sqrt(norm * float(found.energies[0]))
    nodes, weights = _radau(T[:PROBES], last[:PROBES], norm)
    t = norm * (1 + torch.logspace(-3, 3, 121, dtype=T.dtype, device=T.device))
    traces = norms[:PROBES, None].square() * (weights[:, :, None] / (t - nodes[:, :, None])).sum(1)
    missed = (t[:, None] - found.energies).clamp(min=0).sum(1) + traces.mean(0)
    missed += 3 * traces.std(0) / math.sqrt(PROBES)
    least = found.remainder - float(missed.min()) - found.rounding
    return math.sqrt(found.remainder / least) - 1 if least > 0 else math.inf


def _lanczos(gram: Tensor, A: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what Lanczos makes of C (see `excess`) from each row of `starts`, with A's part taken out.

    Float64: T (starts, STEPS, STEPS), tridiagonal; the coefficient that would come next, and the norm of the start, (starts,).
    """
    tiny = torch.finfo(gram.dtype).tiny
    T = torch.zeros(len(starts), STEPS, STEPS, dtype=torch.float64, device=gram.device)
    X = without(starts, A)
    norms = beta = X.norm(dim=1)
    previous = torch.zeros_like(X)
    for j in range(STEPS):
        X = X / beta.clamp(min=tiny)[:, None]
        Y = without(X @ gram, A)
        if j:
            T[:, j, j - 1] = T[:, j - 1, j] = beta.double()
            Y -= beta[:, None] * previous
        alpha = (X * Y).sum(1)
        T[:, j, j] = alpha.double()
        previous, X = X, Y - alpha[:, None] * X
        beta = X.norm(dim=1)
    return T, beta.double(), norms.double()


def _radau(T: Tensor, last: Tensor, end: float) -> tuple[Tensor, Tensor]:
    """Return nodes and weights of the Gauss-Radau rule of each T with a node at `end`, above all eigenvalues."""
    count, size, _ = T.shape
    unit = torch.eye(size, dtype=T.dtype, device=T.device)
    tail = torch.linalg.solve(T - end * unit, unit[:, -1].expand(count, size))[:, -1]
    longer = torch.nn.functional.pad(T, (0, 1, 0, 1))
    longer[:, -1, -2] = longer[:, -2, -1] = last
    longer[:, -1, -1] = end + last.square() * tail
    nodes, vectors = torch.linalg.eigh(longer)
    return nodes, vectors[:, 0].square()
