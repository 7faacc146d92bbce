"""The truncated singular value decomposition from a random subspace, with a checked bound on what that loses.

A Chebyshev polynomial of Wᵀ W turns a sketch into the leading right singular vectors. A few blocks of a Krylov space tell
first from where the polynomial has to rise, and which vectors stand so far out that they are better taken aside. What the
terms leave is measured, and the least that any map of that rank leaves is bounded from below: where the two are too far
apart the polynomial is applied once more, then float64 is tried, then the exact decomposition.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from lrc.solvers.base import Decomposition, Moments, SolverOptions, solver
from lrc.solvers.checks import check
from lrc.solvers.terms import ordered_terms, storage_dtype, stored

BLOCK, BLOCKS = 16, 12  # of the Krylov space: its random rows, and how many times that many it has
WIDEST = 0.75  # of all directions: a wider subspace saves little over the exact decomposition
EXTRA = 32  # least number of directions beyond the rank
MARGIN = 0.8  # the polynomial rises from this part of the estimated cut on: too low costs little, too high loses terms
OUTLIER = 32.0  # times the cut: the polynomial is 1e6 there, as much as float32 bears
NONZEROS = 8  # per column of the sketch
PROBES, STEPS = 8, 8  # random starts of each kind, and Lanczos steps from each, in the bound
ROUNDING = 8.0  # eps ||W||_F², by which a measured squared error may be off


class RandomizedSolver(SolverOptions):
    """Truncated singular value decomposition from a random subspace, its distance to the optimum checked."""

    type: Literal["randomized"] = "randomized"
    tolerance: float = Field(
        default=0.01, gt=0, le=1, description="How much the Frobenius error may exceed the least one, as a fraction of it."
    )
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
    width = max_rank + max(EXTRA, math.ceil(options.oversample * max_rank))
    if max(width, BLOCK * BLOCKS) > WIDEST * min(weight.shape):
        note = f"exact eigh of the Gram matrix: {width} directions of {min(weight.shape)} save nothing"
        return replace(exact(weight, max_rank), bias=bias, notes=(note,))
    notes: list[str] = []
    for dtype in dict.fromkeys((storage_dtype(weight), torch.float64)):
        found, above = _search(tall(weight, dtype), max_rank, width, options, generator, notes)
        if above <= options.tolerance:
            return replace(found.terms(weight), bias=bias, notes=tuple(notes))
        if not found.coarse(options.tolerance) and above < math.inf:
            break
    return replace(exact(weight, max_rank), bias=bias, notes=(*notes, "exact eigh of the Gram matrix"))


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
        scale = peak(weight)
        B, A = self.images.T * math.sqrt(scale), self.A * math.sqrt(scale)
        if weight.shape[0] < weight.shape[1]:
            B, A = A.T, B.T
        terms = stored(B, A, self.energies.sqrt() * scale, len(self.energies), storage_dtype(weight))
        return replace(terms, remainder=self.remainder * scale**2)


def peak(weight: Tensor) -> float:
    """Return the largest magnitude, or 1 for a zero weight: what to divide by, lest squares under- or overflow."""
    return float(weight.abs().max()) or 1.0


def tall(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight over its peak in `dtype`, its longer side first."""
    W = weight.to(dtype) / peak(weight)
    return W if W.shape[0] >= W.shape[1] else W.T


def exact(weight: Tensor, max_rank: int) -> Decomposition:
    """Return the terms of the truncated SVD by float64 eigh of the smaller Gram matrix, whatever the weight's unit."""
    scale, dtype = peak(weight), storage_dtype(weight)
    terms = ordered_terms(weight.double() / scale, None, None, max_rank, torch.float64)
    B, A = ((side * math.sqrt(scale)).to(dtype) for side in (terms.B, terms.A))
    return replace(terms, B=B, A=A, S=terms.S * scale, remainder=terms.remainder * scale**2)


def measured(W: Tensor, A: Tensor, images: Tensor) -> Found:
    """Return the orthonormal rows A and their images A Wᵀ as terms, in the order of the energy that they capture."""
    energies = torch.linalg.vector_norm(images, dim=1).double().square()
    order = energies.argsort(descending=True, stable=True)
    total = float(torch.linalg.vector_norm(W, dim=1).double().square().sum())
    return Found(A[order], images[order], energies[order], total)


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
        return torch.linalg.qr(X.T)[0].T.contiguous()
    return torch.linalg.solve_triangular(L.to(X.dtype), X, upper=False)


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
    starts = torch.cat([_normal(PROBES, rank, W, generator) @ found.images @ W, _normal(PROBES, columns, W, generator)])
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
    X = _without(starts, A)
    norms = beta = X.norm(dim=1)
    previous = torch.zeros_like(X)
    for j in range(STEPS):
        X = X / beta.clamp(min=tiny)[:, None]
        Y = _without(X @ gram, A)
        if j:
            T[:, j, j - 1] = T[:, j - 1, j] = beta.double()
            Y -= beta[:, None] * previous
        alpha = (X * Y).sum(1)
        T[:, j, j] = alpha.double()
        previous, X = X, Y - alpha[:, None] * X
        beta = X.norm(dim=1)
    return T, beta.double(), norms.double()


def _without(X: Tensor, A: Tensor) -> Tensor:
    """Return the rows of X less their part in the span of A's orthonormal rows; twice, for what rounding leaves."""
    for _ in range(2):
        X = X - (X @ A.T) @ A
    return X


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
        basis = _filtered(gram, start)
        images = basis @ W.T
        C = _ritz(basis, images)
        found = measured(W, C[:rank] @ basis, C[:rank] @ images)
        above = excess(W, gram, found, generator)
        bound = f"at most {above:.2%} above the least" if above < math.inf else "not bounded"
        notes.append(f"filter {turn} on {len(basis)} directions in {str(W.dtype).removeprefix('torch.')}: error {bound}")
        if above <= options.tolerance or found.coarse(options.tolerance) or above == math.inf:
            break
        values = torch.linalg.vector_norm(C @ images, dim=1).square()
        start = _split(C @ basis, values, float(values[-1]))
    return found, above


def _scout(gram: Tensor, rank: int, width: int, generator: torch.Generator) -> _Start:
    """Return a sparse sketch, and the cut and the outliers that a block Krylov space of WᵀW shows.

    The cut estimates eigenvalue number `width`. Ritz values, each weighed by what the random first block holds of its vector,
    are the Gauss quadrature of the eigenvalue density (Lin, Saad & Yang (2016), doi:10.1137/130934283); they come in groups,
    one for each application of WᵀW, between whose medians the reciprocal eigenvalue is interpolated.
    """
    X = _normal(BLOCK, len(gram), gram, generator)
    basis = products = X[:0]
    for _ in range(BLOCKS):
        for _ in range(2):
            X = orthonormal(_without(X, basis))
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
    return start._replace(X=_sparse_signs(width - len(start.U), gram, generator))


def _split(vectors: Tensor, values: Tensor, cut: float) -> _Start:
    """Return the vectors (rows, largest value first) as a start, those far above the cut as its outliers."""
    cut = MARGIN * max(cut, torch.finfo(values.dtype).eps * float(values[0]))
    high = values > OUTLIER * cut
    return _Start(vectors[~high], vectors[high], values[high], cut)


def _filtered(gram: Tensor, start: _Start) -> Tensor:
    """Return rows that span the outliers and T₃(2 gram / cut - I) of the start: at most 1 below the cut, steep above.

    The outliers are taken down to the cut for it, so that their rounding does not drown the others.
    """
    X, cut = start.X, start.cut
    if len(start.U):
        gram = torch.addmm(gram, start.U.T * (cut - start.heights), start.U)
    first, X = X @ gram * (2 / cut), X.to_dense() if X.is_sparse else X
    first -= X
    second = torch.addmm(X + 2 * first, first, gram, beta=-1, alpha=4 / cut)
    third = torch.addmm(first + 2 * second, second, gram, beta=-1, alpha=4 / cut)
    return orthonormal(torch.cat([start.U, third]))


def _ritz(basis: Tensor, images: Tensor) -> Tensor:
    """Return C with C @ basis the Ritz vectors of WᵀW, largest first; basis: near orthonormal rows, images: basis Wᵀ.

    Found in float64 where values span orders of magnitude: eigh is accurate to eps of the largest, and mixes those below.
    Its vectors are made orthonormal again, since eigh in float32 leaves them 1e-5 off.
    """
    L = torch.linalg.cholesky(row_gram(basis))
    half = torch.linalg.solve_triangular(L, row_gram(images), upper=False)
    H = torch.linalg.solve_triangular(L, half.T, upper=False)
    wide = float(H.diagonal().min()) < 1e-3 * float(H.diagonal().max())
    vectors = torch.linalg.eigh(H.double() if wide else H)[1].T.flip(0)
    return torch.linalg.solve_triangular(L, orthonormal(vectors.to(H.dtype)), upper=False, left=False)


def _sparse_signs(rows: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Return a sparse sketch (rows, columns) with NONZEROS signs in each column."""
    shape, device = (NONZEROS, like.shape[1]), generator.device
    index = torch.stack([torch.randperm(shape[1], generator=generator, device=device) for _ in range(NONZEROS)]) % rows
    signs = torch.randint(2, shape, generator=generator, device=device).to(like.dtype) * 2 - 1
    place = torch.stack([index, torch.arange(shape[1], device=device).expand(shape)]).flatten(1)
    return torch.sparse_coo_tensor(place, signs.flatten(), (rows, shape[1]), check_invariants=True).to(like.device)


def _normal(rows: int, columns: int, like: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(rows, columns, generator=generator, dtype=like.dtype, device=generator.device)
    return drawn.to(like.device)
