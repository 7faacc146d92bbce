"""The truncated singular value decomposition from a random subspace, with a checked bound on what that loses.

A few blocks of a Krylov space show the spectrum. Where it is flat, a Chebyshev polynomial of Wᵀ W then turns a sketch into
the subspace; where it decays, the Krylov space grows. Rayleigh-Ritz orders the terms. Their error is measured, and the
least error of any map of that rank is bounded from below; where the two are too far apart the next larger subspace is
tried, then float64, then the exact decomposition.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lrc.solvers.base import Decomposition, Moments, SolverOptions, solver
from lrc.solvers.checks import check
from lrc.solvers.terms import ordered_terms, storage_dtype, stored

BLOCK = 64  # rows of a Krylov block: fewer make slow products, more a poorer space
SCOUT = 4 * BLOCK  # rows that show the spectrum
WIDEST = 0.75  # of all directions: a wider subspace saves nothing over the exact decomposition
GROWTH = 1e6  # of the filter over the spectrum, that float32 bears
MARGIN = 0.9  # the filter starts at this part of the estimated cut: too low costs little, too high loses terms
NONZEROS = 8  # per column of the sketch
PROBES = 8  # random starts of each kind in the bound
STEPS = 8  # Lanczos steps of each
ROUNDING = 8.0  # eps ||W||_F², by which a measured squared error may be off


class RandomizedSolver(SolverOptions):
    """Truncated singular value decomposition from a random subspace, its distance to the optimum checked."""

    type: Literal["randomized"] = "randomized"
    tolerance: float = Field(
        default=0.01, gt=0, le=1, description="How much the Frobenius error may exceed the least one, as a fraction of it."
    )
    oversample: float = Field(
        default=0.3, gt=0, le=4, description="Directions of the sketch beyond `max_rank`, as a fraction of it."
    )
    max_iterations: int = Field(
        default=3, ge=1, le=16, description="Subspaces tried, each better than the last, before the exact decomposition."
    )


@dataclass(frozen=True)
class Found:
    """Terms of a tall W (rows, columns), largest first.

    A: (rank, columns), orthonormal. images: A Wᵀ, (rank, rows). energies: their squared norms, float64.
    total: ||W||_F².
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
    float32. S and remainder are measured. The notes say which subspaces were tried and what the bound of `excess` (which
    is probabilistic) said of them. Raises SolverError on values that are not finite.
    Source: Halko, Martinsson & Tropp (2011), doi:10.1137/090771806; filter: Zhou, Saad, Tiago & Chelikowsky (2006),
    doi:10.1016/j.jcp.2006.03.017; Krylov: Musco & Musco (2015), arXiv:1504.05477; sparse sketch: Tropp, Yurtsever, Udell &
    Cevher (2019), doi:10.1137/18M1201068.
    """
    check(weight, bias, moments, max_rank, options.needs)
    notes: list[str] = []
    for dtype in dict.fromkeys((storage_dtype(weight), torch.float64)):
        W, peak = tall(weight, dtype)
        coarse = False
        for basis, images, how in _subspaces(W, max_rank, options, generator):
            found = _ritz(basis, images, max_rank, squared_norm(W))
            coarse = found.rounding > options.tolerance * found.remainder
            above = math.inf if coarse else excess(W, found, generator)
            notes.append(verdict(how, dtype, above, coarse=coarse))
            if above <= options.tolerance:
                return replace(to_terms(found, weight, peak), bias=bias, notes=tuple(notes))
            if coarse:
                break
        if not coarse:
            break
    return replace(exact(weight, max_rank), bias=bias, notes=(*notes, "exact eigh of the Gram matrix"))


def verdict(how: str, dtype: torch.dtype, above: float, *, coarse: bool) -> str:
    """Return the note on one attempt."""
    said = "too coarse for this spectrum" if coarse else f"error at most {above:.2%} above the least"
    return f"{how} in {str(dtype).removeprefix('torch.')}: {said}"


def tall(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Return the weight in `dtype`, its longer side first, over its largest entry, and that entry (1 for a zero weight)."""
    peak = float(weight.abs().max()) or 1.0
    W = weight.to(dtype) / peak
    return (W if W.shape[0] >= W.shape[1] else W.T), peak


def squared_norm(W: Tensor) -> float:
    """Return ||W||_F², summed in float64."""
    return float(torch.linalg.vector_norm(W, dtype=torch.float64)) ** 2


def row_gram(X: Tensor, blocks: int = 8) -> Tensor:
    """Return X Xᵀ, one triangle computed and mirrored: near half the work of the product."""
    size = X.shape[0]
    gram = X.new_empty(size, size)
    step = -(-size // blocks)
    for i in range(0, size, step):
        gram[i : i + step, i:] = X[i : i + step] @ X[i:].T
        gram[i + step :, i : i + step] = gram[i : i + step, i + step :].T
    return gram


def to_terms(found: Found, weight: Tensor, peak: float) -> Decomposition:
    """Return what was found in W = weight / peak (or its transpose) as terms of `weight`."""
    root = math.sqrt(peak)
    B, A = found.images.T * root, found.A * root
    if weight.shape[0] < weight.shape[1]:
        B, A = A.T, B.T
    terms = stored(B, A, found.energies.sqrt() * peak, len(found.energies), storage_dtype(weight))
    return replace(terms, remainder=found.remainder * peak**2)


def exact(weight: Tensor, max_rank: int) -> Decomposition:
    """Return the terms of the truncated SVD by float64 eigh of the smaller Gram matrix, whatever the weight's unit."""
    peak = float(weight.abs().max()) or 1.0
    terms = ordered_terms(weight.double() / peak, None, None, max_rank, torch.float64)
    root, dtype = math.sqrt(peak), storage_dtype(weight)
    return replace(
        terms,
        B=(terms.B * root).to(dtype),
        A=(terms.A * root).to(dtype),
        S=terms.S * peak,
        remainder=terms.remainder * peak**2,
    )


def excess(W: Tensor, found: Found, generator: torch.Generator) -> float:
    """Return an upper bound on ||W - W Aᵀ A||_F over the least error of that rank, minus 1; inf where none is found.

    W: (rows, columns). With H = A Wᵀ W Aᵀ = diag(energies), E = (I - AᵀA) Wᵀ W Aᵀ and C = (I - AᵀA) Wᵀ W (I - AᵀA), the
    energy that any rank can capture is at most rank t + tr(Wᵀ W - t I)₊ for every t (Ky Fan). For t > ||C||₂, Wᵀ W - t I is
    at most diag(H - t I + Eᵀ (t I - C)⁻¹ E, 0) in the Loewner order (Schur complement), so the energy missed is at most
    sum (t - energies)₊ + tr Eᵀ (t I - C)⁻¹ E, which is minimised over t. The trace is estimated from random z as the mean of
    (E z)ᵀ (t I - C)⁻¹ (E z) plus three standard errors, each from above by Gauss-Radau quadrature; ||C||₂ is the largest
    Ritz value of random starts and of E z, plus its residual.
    Source: Fan (1949), doi:10.1073/pnas.35.11.652; Golub & Meurant (2010), Matrices, Moments and Quadrature, chapter 6;
    Zhou & Li (2011), doi:10.1016/j.laa.2010.06.034 (the bound on ||C||₂).
    """
    rank, columns = found.A.shape
    starts = torch.cat([_normal(PROBES, rank, W, generator) @ found.images @ W, _normal(PROBES, columns, W, generator)])
    T, last, norms = _lanczos(W, found.A, starts)
    nodes, vectors = torch.linalg.eigh(T)
    rounding = torch.finfo(W.dtype).eps * float(found.energies[0])
    norm = 1.001 * float((nodes + (last[:, None] * vectors[:, -1]).abs()).max()) + rounding
    nodes, weights = _radau(T[:PROBES], last[:PROBES], norm)
    t = norm * (1 + torch.logspace(-3, 3, 121, dtype=T.dtype, device=T.device))
    traces = norms[:PROBES, None].square() * (weights[:, :, None] / (t - nodes[:, :, None])).sum(1)
    error = traces.std(0) / math.sqrt(PROBES)
    missed = (t[:, None] - found.energies).clamp(min=0).sum(1) + traces.mean(0) + 3 * error
    least = found.remainder - float(missed.min()) - found.rounding
    return math.sqrt(found.remainder / least) - 1 if least > 0 else math.inf


def _lanczos(W: Tensor, A: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what STEPS of Lanczos make of C (see `excess`) from each row of `starts`, projected: T, last β, norms.

    T: (starts, STEPS, STEPS) tridiagonal, last: (starts,), the coefficient that would come next, norms: (starts,) of the
    projected starts; float64.
    """
    tiny = torch.finfo(W.dtype).tiny
    T = torch.zeros(len(starts), STEPS, STEPS, dtype=torch.float64, device=W.device)
    X = _project(starts, A)
    norms = beta = X.norm(dim=1)
    previous = torch.zeros_like(X)
    for j in range(STEPS):
        X = X / beta.clamp(min=tiny)[:, None]
        Y = _project(X @ W.T @ W, A)
        if j:
            T[:, j, j - 1] = T[:, j - 1, j] = beta.double()
            Y -= beta[:, None] * previous
        alpha = (X * Y).sum(1)
        T[:, j, j] = alpha.double()
        previous, X = X, Y - alpha[:, None] * X
        beta = X.norm(dim=1)
    return T, beta.double(), norms.double()


def _radau(T: Tensor, last: Tensor, end: float) -> tuple[Tensor, Tensor]:
    """Return nodes and weights of the Gauss-Radau rule of each T with a node at `end`, which lies above all eigenvalues."""
    count, size, _ = T.shape
    unit = torch.eye(size, dtype=T.dtype, device=T.device)
    tail = torch.linalg.solve(T - end * unit, unit[:, -1].expand(count, size))[:, -1]
    extended = torch.nn.functional.pad(T, (0, 1, 0, 1))
    extended[:, -1, -2] = extended[:, -2, -1] = last
    extended[:, -1, -1] = end + last.square() * tail
    nodes, vectors = torch.linalg.eigh(extended)
    return nodes, vectors[:, 0].square()


def _project(X: Tensor, A: Tensor) -> Tensor:
    """Return the rows of X without their parts in the span of A's orthonormal rows; twice, for what rounding leaves."""
    for _ in range(2):
        X = X - (X @ A.T) @ A
    return X


def _normal(rows: int, columns: int, like: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(rows, columns, generator=generator, dtype=like.dtype, device=generator.device)
    return drawn.to(like.device)


def _ritz(basis: Tensor, images: Tensor, rank: int, total: float) -> Found:
    """Return the best terms in a subspace: Rayleigh-Ritz on rows that are independent, not quite orthonormal.

    basis: (width, columns). images: basis Wᵀ.
    """
    L = torch.linalg.cholesky(row_gram(basis).double())
    half = torch.linalg.solve_triangular(L, row_gram(images).double(), upper=False)
    H = torch.linalg.solve_triangular(L, half.T.contiguous(), upper=False)
    vectors = torch.linalg.eigh((H + H.T) / 2)[1][:, -rank:]
    C = torch.linalg.solve_triangular(L.T, vectors.double(), upper=True).T.to(basis.dtype)
    A, images = C @ basis, C @ images
    energies = torch.linalg.vector_norm(images, dim=1, dtype=torch.float64).square()
    order = energies.argsort(descending=True, stable=True)
    return Found(A[order], images[order], energies[order], total)


def _subspaces(
    W: Tensor, rank: int, options: RandomizedSolver, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, str]]:
    """Yield ever better subspaces: rows (width, columns), independent, their images under W, and a name for the notes."""
    columns = W.shape[1]
    widths = [round_up(rank * (2 + i) / 2, BLOCK) for i in range(1, options.max_iterations + 1)]
    widths = [width for width in (max(w, SCOUT) for w in widths) if width <= WIDEST * columns]
    sketch = round_up(rank * (1 + options.oversample), 8)
    if not widths:
        return
    basis, images = W.new_empty(widths[-1], columns), W.new_empty(widths[-1], W.shape[0])
    _krylov(W, basis, images, 0, SCOUT, generator)
    top, cut = _cut(images[:SCOUT], sketch / columns)
    if widths[0] > SCOUT and cut > 0 and _growth(top / cut) < GROWTH:
        yield from _filtered(W, sketch, cut, options.max_iterations, generator)
        return
    rows = SCOUT
    for width in widths:
        _krylov(W, basis, images, rows, width, generator)
        rows = width
        yield basis[:rows], images[:rows], f"block Krylov space of {rows}"


def _filtered(
    W: Tensor, width: int, cut: float, rounds: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, str]]:
    gram = row_gram(W.T)
    sketch = _sparse_signs(width, W, generator)
    basis = sketch.to_dense()
    product = sketch @ gram
    for i in range(rounds):
        basis = orthonormal(_chebyshev(gram, basis, product, cut))
        yield basis, basis @ W.T, f"Chebyshev filter of degree {3 * (i + 1)} on {width} directions"
        product = basis @ gram


def _chebyshev(gram: Tensor, X: Tensor, product: Tensor, cut: float) -> Tensor:
    """Return T₃(2 gram / cut - I) on the rows of X, product = X gram: at most 1 below the cut, steeply rising above."""
    first = product.mul(2 / cut).sub_(X)
    second = torch.addmm(X + 2 * first, first, gram, beta=-1, alpha=4 / cut)
    return torch.addmm(first + 2 * second, second, gram, beta=-1, alpha=4 / cut)


def _growth(ratio: float) -> float:
    """Return T₃ at the largest eigenvalue, `ratio` times the cut."""
    x = 2 * ratio - 1
    return 4 * x**3 - 3 * x


def _sparse_signs(rows: int, W: Tensor, generator: torch.Generator) -> Tensor:
    """Return a sparse sketch (rows, columns) with NONZEROS signs in each column."""
    columns = W.shape[1]
    shape = (NONZEROS, columns)
    index = torch.stack([torch.randperm(columns, generator=generator, device=generator.device) for _ in range(NONZEROS)])
    signs = torch.randint(2, shape, generator=generator, device=generator.device).to(W.dtype) * 2 - 1
    place = torch.stack([(index % rows).flatten(), torch.arange(columns, device=index.device).repeat(NONZEROS)])
    return torch.sparse_coo_tensor(place, signs.flatten(), (rows, columns), check_invariants=True).to(W.device)


def _krylov(W: Tensor, basis: Tensor, images: Tensor, rows: int, stop: int, generator: torch.Generator) -> None:
    """Fill rows `rows` to `stop` of an orthonormal basis of the Krylov space of Wᵀ W, and of its images under W, in place."""
    for j in range(rows, stop, BLOCK):
        X = images[j - BLOCK : j] @ W if j else _normal(BLOCK, W.shape[1], W, generator)
        for _ in range(2):
            X = orthonormal(X - (X @ basis[:j].T) @ basis[:j])
        basis[j : j + BLOCK] = X
        images[j : j + BLOCK] = X @ W.T


def _cut(images: Tensor, fraction: float) -> tuple[float, float]:
    """Return the largest eigenvalue of Wᵀ W and the one that about `fraction` of all lie above, less a margin.

    images: of the first blocks of a Krylov space. Its Ritz values, each weighed by what of it the first, random block
    holds, are the Gauss quadrature of the density of eigenvalues: Lin, Saad & Yang (2016), doi:10.1137/130934283.
    """
    values, vectors = torch.linalg.eigh(row_gram(images).double())
    above = vectors[:BLOCK].square().mean(0).flip(0).cumsum(0)
    place = int((above < fraction).sum().clamp(max=len(values) - 1))
    return float(values[-1]), MARGIN * float(values.flip(0)[place])


def orthonormal(X: Tensor) -> Tensor:
    """Return orthonormal rows with the span of X's: Cholesky in float64, Householder where X is near singular."""
    L, info = torch.linalg.cholesky_ex(row_gram(X.double()))
    pivots = L.diagonal()
    if int(info) or not float(pivots.min()) > 1e-7 * float(pivots.max()):
        return torch.linalg.qr(X.T)[0].T.contiguous()
    return torch.linalg.solve_triangular(L.to(X.dtype), X, upper=False)


def round_up(size: float, step: int) -> int:
    """Return the least multiple of `step` that is at least `size`."""
    return step * math.ceil(size / step)
