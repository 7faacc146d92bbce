"""spatial: a k x 1 convolution, then a 1 x k one."""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lrc.forms.base import KernelForm, Ranks, Size, spread
from lrc.forms.fit import Behind, behind, leading_rows, marginal
from lrc.maps import Geometry, Layout, Patches
from lrc.solvers import Norm

POINTS = 64


class Spatial(KernelForm):
    """W[o, c, h, w] = sum over r of B[o, r, w] A[r, c, h]: the first dimension that has a kernel, then all others.

    In three dimensions the first one is apart (time, most often). The rows of A are the leading ones of the reshuffled weight
    ((out, w), (in, h)), weighed by the outputs and by the inputs' second moment along (in, h); B is the least squares behind
    them in the whole norm, for every rank at once.
    Source: Jaderberg et al. (2014), arXiv:1405.3866, scheme 2; the closed form of Tai et al. (2016), arXiv:1511.06067.
    Departure: the norm.
    """

    name: ClassVar[str] = "spatial"

    def fits(self, layout: Layout) -> bool:
        """Say whether the kernel has two dimensions to be split."""
        return super().fits(layout) and isinstance(layout, Patches) and sum(k > 1 for k in layout.kernel) > 1

    def limits(self, size: Size) -> Ranks:
        """Return the smaller side of the reshuffled weight."""
        first = split(size)
        return (min(size[1] * size[2 + first], size[0] * math.prod(size[2:]) // size[2 + first]),)

    def choices(self, size: Size, round_to: int) -> list[Ranks]:
        """Return ranks up to that at which nothing is saved."""
        most = min((math.prod(size) - 1) // self.numbers(size, (1,)), *self.limits(size))
        return [(rank,) for rank in spread(most, round_to, POINTS)]

    def shapes(self, size: Size, ranks: Ranks) -> list[Size]:
        """Return (out, rank, 1, w) and (rank, in, h, 1)."""
        first = split(size)
        outer = [1 if dim == first else k for dim, k in enumerate(size[2:])]
        inner = [k if dim == first else 1 for dim, k in enumerate(size[2:])]
        return [(size[0], ranks[0], *outer), (ranks[0], size[1], *inner)]

    def geometries(self, layout: Patches, size: Size, ranks: Ranks) -> list[Geometry]:
        """Return the strides and paddings along the dimensions of each."""
        first = split(size)
        others = [dim for dim in range(len(layout.kernel)) if dim != first]
        return [layout.geometry.along(others), layout.geometry.along([first])]

    def losses(self, norm: Norm, size: Size, choices: Sequence[Ranks]) -> Tensor:
        """Return the exact squared errors."""
        width = math.prod(size[2:]) // size[2 + split(size)]
        found = look(norm, size, max(ranks[0] for ranks in choices))[1].losses()
        return found[[ranks[0] * width for ranks in choices]]

    def kernels(self, norm: Norm, size: Size, ranks: Ranks) -> list[Tensor]:
        """Return B and A."""
        A, seen = look(norm, size, ranks[0])
        outer, inner = self.shapes(size, ranks)
        return [seen.last(len(seen.R)).reshape(outer), A.reshape(inner)]


def split(size: Size) -> int:
    """Return the spatial dimension that is convolved first: the first one with a kernel."""
    return next(dim for dim, k in enumerate(size[2:]) if k > 1)


def look(norm: Norm, size: Size, rank: int) -> tuple[Tensor, Behind]:
    """Return A (rank, in * h) and the target behind it; the basis has a row for every (rank, place along the others)."""
    first = split(size)
    m, c, h = size[0], size[1], size[2 + first]
    width = math.prod(size[2:]) // h
    T = norm.target if norm.left is None else norm.left.apply(norm.target.T).T
    X = T.reshape(m, c, *size[2:]).movedim(2 + first, 2)  # (out, in, h, *others)
    X = X.reshape(m, c * h, width).transpose(1, 2).reshape(m * width, c * h)
    A = leading_rows(X, marginal(norm, size, (0, 1 + first)))[:rank]
    basis = torch.einsum("rk,vw->rvkw", A, torch.eye(width, dtype=A.dtype, device=A.device))
    others = [k for dim, k in enumerate(size[2:]) if dim != first]
    basis = basis.reshape(len(A) * width, c, h, *others).movedim(2, 2 + first)
    return A, behind(norm, basis.reshape(len(A) * width, -1))
