"""The truncated singular value decomposition from a random subspace, with a checked bound on what that loses.

A Chebyshev polynomial of Wᵀ W turns a sketch into the leading right singular vectors. A few blocks of a Krylov space tell
first from where the polynomial has to rise, and which vectors stand so far out that they are better taken aside. What the
terms leave is measured, and the least that any map of that rank leaves is bounded from below: where the two are too far
apart the polynomial is applied once more, then float64 is tried, then the exact decomposition.
"""

import math
from dataclasses import replace
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from lrc.solvers.base import Decomposition, Moments, SolverOptions, solver
from lrc.solvers.checks import check
from lrc.solvers.excess import Found, excess, measured
from lrc.solvers.gram import GramSolver, gram
from lrc.solvers.subspace import normal, orthonormal, ritz, row_gram, sparse_signs, without
from lrc.solvers.terms import square_scale, storage_dtype

BLOCK, BLOCKS = 16, 12  # of the Krylov space: its random rows, and how many times that many it has
WIDEST = 0.75  # of all directions: a wider subspace saves little over the exact decomposition
EXTRA = 32  # least number of directions beyond the rank
MARGIN = 0.8  # the polynomial rises from this part of the estimated cut on: too low costs little, too high loses terms
OUTLIER = 32.0  # times the cut: the polynomial is 1e6 there, as much as float32 bears


class WithinTolerance(SolverOptions):
    """The options of a solver that computes leading terms alone, within a stated error."""

    tolerance: float = Field(
        default=0.01, gt=0, le=1, description="How much the Frobenius error may exceed the least one, as a fraction of it."
    )
    leading: ClassVar[bool] = True


class RandomizedSolver(WithinTolerance):
    """Truncated singular value decomposition from a random subspace, its distance to the optimum checked."""

    type: Literal["randomized"] = "randomized"
    oversample: float = Field(
        default=0.22, gt=0, le=4, description="Directions searched beyond `max_rank`, as a fraction of it."
    )
    max_iterations: int = Field(
        default=3, ge=1, le=16, description="How often the polynomial is applied before the exact decomposition is taken."
    )


@solver(RandomizedSolver)
def randomized(
    weight: Tensor,
    bias: Tensor | None,
    moments: Moments,
    max_rank: int,
    options: RandomizedSolver,
    generator: torch.Generator,
) -> Decomposition:
    """Return the leading terms of the truncated SVD, at most `options.tolerance` above the least Frobenius error.

    weight: (out_features, in_features); worked in float64 if it is float64 or if float32 turns out too coarse, else in
    float32. S and remainder are measured. The notes say what was tried and what the bound `excess`, which holds with
    high probability, said of it. Raises SolverError on values that are not finite.
    Source: Halko, Martinsson & Tropp (2011), doi:10.1137/090771806; the filter: Zhou, Saad, Tiago & Chelikowsky (2006),
    doi:10.1016/j.jcp.2006.03.017; the sketch: Tropp, Yurtsever, Udell & Cevher (2019), doi:10.1137/18M1201068.
    """
    check(weight, bias, moments, max_rank, options.needs)
    width = directions(weight, max_rank, options)
    notes: list[str] = []
    if width is None:
        notes.append("exact eigh of the Gram matrix: a subspace would be nearly as large as the weight")
        return replace(gram(weight, bias, moments, max_rank, GramSolver(), generator), notes=tuple(notes))
    for dtype in dict.fromkeys((storage_dtype(weight), torch.float64)):
        try:
            found, above = _search(tall(weight, dtype), max_rank, width, options, generator, notes)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            notes.append(f"no orthonormal subspace in {str(dtype).removeprefix('torch.')}")
            continue
        if above <= options.tolerance:
            return replace(found.terms(weight), bias=bias, notes=tuple(notes))
        if not found.coarse(options.tolerance) and above < math.inf:
            break
    notes.append("exact eigh of the Gram matrix")
    return replace(gram(weight, bias, moments, max_rank, GramSolver(), generator), notes=tuple(notes))


def directions(weight: Tensor, max_rank: int, options: RandomizedSolver) -> int | None:
    """Return how wide a subspace to search, or None where that would save nothing over an exact decomposition."""
    width = max_rank + max(EXTRA, math.ceil(options.oversample * max_rank))
    return width if max(width, BLOCK * BLOCKS) <= WIDEST * min(weight.shape) else None


def tall(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight over its `square_scale` in `dtype`, its longer side first."""
    scale = square_scale(weight)
    W = weight.to(dtype) if scale == 1 else weight.to(dtype) / scale
    return W if W.shape[0] >= W.shape[1] else W.T


class _Start(NamedTuple):
    """What the polynomial is applied to, X (sparse or dense rows), beside outliers U (rows) and their eigenvalues."""

    X: Tensor
    U: Tensor
    heights: Tensor
    cut: float


def _search(
    W: Tensor, rank: int, width: int, options: RandomizedSolver, generator: torch.Generator, notes: list[str]
) -> tuple[Found, float]:
    """Return terms and the bound on their excess, after as many turns as it takes or may take; adds a note on each."""
    gram = row_gram(W.T)
    start = _scout(gram, rank, width, generator)
    for turn in range(1, options.max_iterations + 1):
        lowering = start.cut - start.heights
        gram.addmm_(start.U.T * lowering, start.U)  # outliers down to the cut, lest their rounding drown the others
        basis = _filtered(gram, start)
        images = basis @ W.T
        C = ritz(basis, images)
        found = measured(W, C[:rank] @ basis, C[:rank] @ images)
        above = excess(W, gram, found, generator)  # outliers are in the span of the terms, which it takes out of gram
        bound = f"at most {above:.2%} above the least" if above < math.inf else "not bounded"
        notes.append(f"filter {turn} on {len(basis)} directions in {str(W.dtype).removeprefix('torch.')}: error {bound}")
        if above <= options.tolerance or found.coarse(options.tolerance) or above == math.inf:
            break
        gram.addmm_(start.U.T * -lowering, start.U)
        values = torch.linalg.vector_norm(C @ images, dim=1).square()
        start = _split(C @ basis, values, float(values[-1]))
    return found, above


def _scout(gram: Tensor, rank: int, width: int, generator: torch.Generator) -> _Start:
    """Return a sparse sketch, and the cut and the outliers that a block Krylov space of WᵀW shows.

    The cut estimates eigenvalue number `width`. Ritz values, each weighed by what the random first block holds of its vector,
    are the Gauss quadrature of the eigenvalue density (Lin, Saad & Yang (2016), doi:10.1137/130934283); they come in groups,
    one for each application of WᵀW, between whose medians the reciprocal eigenvalue is interpolated.
    """
    X = normal(BLOCK, len(gram), gram, generator)
    basis = products = X[:0]
    for _ in range(BLOCKS):
        X = orthonormal(without(X, basis), exactly=True)
        basis, X = torch.cat([basis, X]), X @ gram
        products = torch.cat([products, X])
    values, vectors = (x.flip(-1) for x in torch.linalg.eigh((basis @ products.T).double()))
    values = values.clamp(min=torch.finfo(gram.dtype).eps * float(values[0]))
    shares = vectors[:BLOCK].square().mean(0).view(BLOCKS, BLOCK).sum(1)
    places, slow = shares.cumsum(0) - shares / 2, 1 / values.view(BLOCKS, BLOCK).median(1).values
    right = int((places < width / len(gram)).sum().clamp(1, BLOCKS - 1))
    part = float((width / len(gram) - places[right - 1]) / (places[right] - places[right - 1]))
    cut = 1 / float(torch.lerp(slow[right - 1], slow[right], min(max(part, 0.0), 1.0)))
    start = _split(vectors.T.to(gram.dtype) @ basis, values.to(gram.dtype), cut)
    if len(start.U) > BLOCK:  # a spectrum that decays needs fewer
        width = (rank + width) // 2
    return start._replace(X=sparse_signs(width - len(start.U), gram, generator))


def _split(vectors: Tensor, values: Tensor, cut: float) -> _Start:
    """Return the vectors (rows, largest value first) as a start, those far above the cut as its outliers."""
    cut = MARGIN * max(cut, torch.finfo(values.dtype).eps * float(values[0]))
    high = values > OUTLIER * cut
    return _Start(vectors[~high], vectors[high], values[high], cut)


def _filtered(gram: Tensor, start: _Start) -> Tensor:
    """Return rows that span the outliers and T₃(2 gram / cut - I) of the start: at most 1 below the cut, steep above."""
    X, U, cut = start.X, start.U, start.cut
    first, zeroth = X @ gram, X.to_dense() if X.is_sparse else X.clone()
    first.mul_(2 / cut).sub_(zeroth)
    second = zeroth.add_(first, alpha=2).addmm_(first, gram, beta=-1, alpha=4 / cut)
    third = first.add_(second, alpha=2).addmm_(second, gram, beta=-1, alpha=4 / cut)
    middle = third.norm(dim=1).max().sqrt()  # of what Cholesky meets in the others
    return orthonormal(torch.cat([U * middle, third]), exactly=len(U) > 0)
