"""One factor refitted with the other held fixed: a small weighted least-squares problem for every row, all at once.

Row i: min over x of sum over j of w_ij (M_ij - x·f_j)² + ridge |x|², f_j the rows of F. Exactly, by the normal equations, whose
k x k matrices of all rows are one product; or by conjugate gradients behind a sketch, which never forms them.
"""

from typing import Literal, Protocol

import torch
from torch import Tensor

Lsq = Literal["exact", "sketch_pcg"]
BLOCK = 1 << 23  # numbers that the matrices of a block of rows may take, 64 MB
PIVOT = 1e-13  # smallest squared diagonal of a Cholesky factor, of the largest, that is taken for more than rounding
SKETCH = 4  # rows of a sketch over the rank: a random one has a condition number of about 3 then
STEPS = 40  # of conjugate gradients: behind a good sketch each takes off more than half of the error
UNSEEN = 1e-6  # of what the sketch says of a direction: with less, no entry of the row sees it
REDUCTION = 0.1  # of the error of the start that a step of the alternation leaves


class Weighted(Protocol):
    """A matrix M of shape `shape` whose entries have weights, seen row by row; `T` sees it column by column."""

    shape: tuple[int, int]

    def block(self, low: int, high: int) -> "Weighted":
        """Return some of the rows."""

    def weigh(self, X: Tensor) -> Tensor:
        """Return weights @ X."""

    def weigh_values(self, X: Tensor) -> Tensor:
        """Return (weights * M) @ X."""

    def normal(self, F: Tensor, X: Tensor) -> Tensor:
        """Return (weights * (X Fᵀ)) F."""

    def sketch(self, F: Tensor, size: int, generator: torch.Generator) -> Tensor:
        """Return D_i^{1/2} F for every row i, D_i its weights, sketched down to about `size` rows; (rows, size, rank)."""


def refitted(problem: Weighted, F: Tensor, X: Tensor, ridge: float, lsq: Lsq, generator: torch.Generator) -> Tensor:
    """Return the least-squares rows (rows, rank) for F (columns, rank), all float64.

    X: the rows so far, where conjugate gradients start; they take their error down by REDUCTION. Since that error shrinks
    with the distance from the optimum, so does what is left of it: an accuracy fixed beforehand would end the alternation at
    that accuracy. Source: Gu, Song, Yin & Zhang (2024), arXiv:2302.11068, robustness of the alternation. Departure: started
    from the rows so far, not from the sketched solution.
    """
    rows, rank = problem.shape[0], F.shape[1]
    step = max(1, BLOCK // ((SKETCH if lsq == "sketch_pcg" else 1) * rank * rank))
    parts = []
    for low in range(0, rows, step):
        block = problem.block(low, min(rows, low + step))
        if lsq == "exact":
            parts.append(exact(block, F, X[low : low + step], ridge))
        else:
            parts.append(conjugate(block, F, X[low : low + step], ridge, REDUCTION, generator))
    return torch.cat(parts)


def exact(problem: Weighted, F: Tensor, X: Tensor, ridge: float) -> Tensor:
    """Return the solution of (Fᵀ D_i F + ridge) x_i = Fᵀ D_i M_i for every row i, (rows, rank), the nearest to X if many.

    The matrices of all rows are the weights times the products of pairs of columns of F: one (sparse or dense) product.
    """
    rank = F.shape[1]
    gram = F.new_zeros(problem.shape[0], rank, rank)
    i, j = torch.tril_indices(rank, rank, device=F.device)
    width = max(1, BLOCK // len(F))
    for some, others in zip(i.split(width), j.split(width), strict=True):
        gram[:, some, others] = problem.weigh(F[:, some] * F[:, others])
    gram.diagonal(dim1=1, dim2=2).add_(ridge)
    return solved(gram, problem.weigh_values(F), X)


def solved(gram: Tensor, right: Tensor, X: Tensor) -> Tensor:
    """Return gram⁻¹ right for each of a batch of symmetric matrices (rows, rank, rank), given by their lower triangles.

    Where one is singular up to rounding (a row with fewer known entries than the rank), X is corrected in the directions that
    the entries say something about, and left alone in the others: the error cannot grow by what is not solved for.
    """
    L, info = torch.linalg.cholesky_ex(gram)
    pivots = L.diagonal(dim1=1, dim2=2).square()
    bad = (info != 0) | ~(pivots.min(1).values > PIVOT * pivots.max(1).values)
    found = _divided(right, L)
    if bool(bad.any()):
        e, Q = torch.linalg.eigh(gram[bad])
        usable = e > PIVOT * e[:, -1:].clamp(min=torch.finfo(e.dtype).tiny)
        parts, old = ((Q.mT @ side[bad][:, :, None])[:, :, 0] for side in (right, X))
        found[bad] = (Q @ torch.where(usable, parts / e, old)[:, :, None])[:, :, 0]
    return found


def conjugate(
    problem: Weighted, F: Tensor, X: Tensor, ridge: float, accuracy: float, generator: torch.Generator
) -> Tensor:  # fmt: skip
    """Return the solution of the same equations as `exact`, the error of X over all rows together down by `accuracy`.

    Errors are of predictions, |D_i^{1/2} F (x - x_i)|, as the sketch sees them. A step is two products with the entries, for
    all rows at once. Source: Rokhlin & Tygert (2008), doi:10.1073/pnas.0804869105 (a sketch as the preconditioner).
    """
    L = preconditioner(problem.sketch(F, SKETCH * F.shape[1], generator), ridge)
    right = problem.weigh_values(F)
    least = (32 * torch.finfo(F.dtype).eps) ** 2 * float((right * _divided(right, L)).sum())
    residual = right - problem.normal(F, X) - ridge * X
    direction = Z = _divided(residual, L)
    energy = (residual * Z).sum(1)
    enough = max(accuracy**2 * float(energy.sum()), least)
    for _ in range(STEPS):
        if float(energy.sum()) <= enough:
            break
        image = problem.normal(F, direction) + ridge * direction
        curvature = (direction * image).sum(1)
        seen = curvature > UNSEEN * (L.mT @ direction[:, :, None]).square().sum((1, 2))  # the rest is rounding
        length = torch.where(seen, _ratio(energy, curvature), 0.0)[:, None]
        X, residual = X + length * direction, residual - length * image
        Z = _divided(residual, L)
        before, energy = energy, torch.where(seen, (residual * Z).sum(1), 0.0)
        direction = Z + _ratio(energy, before)[:, None] * direction
    return X


def preconditioner(sketched: Tensor, ridge: float) -> Tensor:
    """Return lower triangles L with L Lᵀ = AᵀA + ridge for each sketch A (rows, size, rank); never singular."""
    gram = sketched.mT @ sketched
    diagonal = gram.diagonal(dim1=1, dim2=2)
    level = ridge + 1e-12 * diagonal.mean(1)  # a sketch may have lost a direction, a row may have no entries
    diagonal += torch.where(level > 0, level, torch.ones_like(level))[:, None]
    L: Tensor = torch.linalg.cholesky(gram)
    return L


def _divided(X: Tensor, L: Tensor) -> Tensor:
    found: Tensor = torch.cholesky_solve(X[:, :, None], L)[:, :, 0]
    return found


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below, torch.zeros_like(above))
