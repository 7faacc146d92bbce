"""cp: 1 x 1, then a kernel along each dimension for every channel by itself, then 1 x 1."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from lrc.forms.base import KernelForm, Ranks, Size
from lrc.forms.fit import Behind, behind, marginal
from lrc.maps import Geometry, Patches
from lrc.solvers import Norm

GRID = 6
SWEEPS = 25
LEAST = 4
WORK = 5e9  # multiply-adds that the sweeps for one rank may take
RIDGE = 1e-6  # of the mean diagonal: factors of one rank may diverge against each other


class Cp(KernelForm):
    """W[o, c, h, w] = sum over r of B[o, r] w[r, w] h[r, h] A[r, c]: the canonical polyadic decomposition.

    A, h and w by alternating least squares on the weight, weighed by the outputs and by the inputs' second moment along every
    dimension alone; B is the least squares behind them in the whole norm. Only a local minimum is promised; the
    starts are drawn by a generator with a fixed seed. Not nested: every rank is decomposed by itself.
    Source: Lebedev et al. (2015), arXiv:1412.6553. Departures: the norm, and a ridge.
    """

    name: ClassVar[str] = "cp"

    def limits(self, size: Size) -> Ranks:
        """Return the largest rank behind which the last factor is still unique."""
        return (math.prod(size[1:]),)

    def choices(self, size: Size, round_to: int) -> list[Ranks]:
        """Return a few ranks: each of them is decomposed anew."""
        most = math.prod(size) // (size[0] + size[1] + sum(k for k in size[2:] if k > 1))
        ranks = {most * part // GRID // round_to * round_to for part in range(1, GRID + 1)}
        return [(rank,) for rank in sorted(ranks) if 0 < rank <= self.limits(size)[0] and self.fewer(size, rank)]

    def fewer(self, size: Size, rank: int) -> bool:
        """Say whether the kernels need fewer numbers than one."""
        return self.numbers(size, (rank,)) < math.prod(size)

    def shapes(self, size: Size, ranks: Ranks) -> list[Size]:
        """Return (out, rank, 1 x 1), (rank, 1, k) for the dimensions with a kernel, the last one first, (rank, in, 1 x 1)."""
        (rank,), dims = ranks, len(size) - 2
        along = [tuple(size[2 + dim] if d == dim else 1 for d in range(dims)) for dim in reversed(axes(size))]
        one = (1,) * dims
        return [(size[0], rank, *one), *((rank, 1, *kernel) for kernel in along), (rank, size[1], *one)]

    def geometries(self, layout: Patches, size: Size, ranks: Ranks) -> list[Geometry]:
        """Return a geometry along each dimension between 1 x 1 ones; the first has the strides of those without a kernel."""
        found, unit = [], Geometry.unit(len(layout.kernel))
        for place, dim in enumerate(axes(size)):
            others = [d for d in range(len(layout.kernel)) if layout.kernel[d] == 1] if place == 0 else []
            found.append(replace(layout.geometry.along([dim, *others]), groups=ranks[0]))
        return [unit, *reversed(found), unit]

    def losses(self, norm: Norm, size: Size, choices: Sequence[Ranks]) -> Tensor:
        """Return the exact squared errors."""
        return torch.stack([look(norm, size, rank)[1].losses()[-1] for (rank,) in choices])

    def kernels(self, norm: Norm, size: Size, ranks: Ranks) -> list[Tensor]:
        """Return B, the kernels along the dimensions, and A."""
        (A, *along), seen = look(norm, size, ranks[0])
        made = [seen.last(ranks[0]), *reversed(along), A]
        return [value.reshape(shape) for value, shape in zip(made, self.shapes(size, ranks), strict=True)]


def axes(size: Size) -> list[int]:
    """Return the spatial dimensions that have a kernel."""
    return [dim for dim, k in enumerate(size[2:]) if k > 1]


def look(norm: Norm, size: Size, rank: int) -> tuple[list[Tensor], Behind]:
    """Return the rows of A and of the kernels along the dimensions, each of length 1, and the target behind them."""
    modes = [1, *(2 + dim for dim in axes(size))]
    roots = [marginal(norm, size, (mode - 1,)) for mode in modes]
    T = norm.target if norm.left is None else norm.left.apply(norm.target.T).T
    X = T.reshape([size[0], *(size[mode] for mode in modes)])
    for place, root in enumerate(roots, 1):
        X = X if root is None else torch.movedim(torch.movedim(X, place, -1) @ root, -1, place)
    factors = alternate(X, rank)[1:]
    rows = []
    for factor, root in zip(factors, roots, strict=True):
        row = factor.T if root is None else torch.linalg.solve_triangular(root, factor.T, upper=False, left=False)
        rows.append(row / row.norm(dim=1, keepdim=True).clamp(min=torch.finfo(row.dtype).tiny))
    basis = rows[0]
    for row in rows[1:]:
        basis = torch.einsum("ra,rb->rab", basis, row).flatten(1)
    return rows, behind(norm, basis)


def alternate(X: Tensor, rank: int) -> list[Tensor]:
    """Return the factors (size, rank) of a tensor by alternating least squares, columns of all but the first of length 1."""
    generator = torch.Generator().manual_seed(rank)
    factors = [torch.randn(size, rank, dtype=X.dtype, generator=generator).to(X.device) for size in X.shape]
    for place, factor in enumerate(factors):
        unfolded = X.movedim(place, 0).flatten(1)
        leading = torch.linalg.eigh(unfolded @ unfolded.T)[1].flip(1)[:, :rank]
        factor[:, : leading.shape[1]] = leading
    sweeps = int(min(SWEEPS, max(LEAST, WORK / (X.ndim * X.numel() * rank))))
    for _ in range(sweeps):
        for place in reversed(range(X.ndim)):
            others = [factor for i, factor in enumerate(factors) if i != place]
            product = others[0]
            for other in others[1:]:
                product = torch.einsum("ar,br->abr", product, other).flatten(0, 1)
            gram = torch.stack([other.T @ other for other in others]).prod(0)
            gram.diagonal().add_(RIDGE * gram.diagonal().mean().clamp(min=torch.finfo(X.dtype).tiny))
            right = X.movedim(place, 0).flatten(1) @ product
            factors[place] = torch.cholesky_solve(right.T, torch.linalg.cholesky(gram)).T
            if place:
                lengths = factors[place].norm(dim=0).clamp(min=torch.finfo(X.dtype).tiny)
                factors[place] = factors[place] / lengths
    return factors
