"""tucker2: fewer channels before and after the kernel."""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lrc.forms.base import KernelForm, Ranks, Size, spread
from lrc.forms.fit import Behind, behind, leading_rows, marginal
from lrc.maps import Geometry, Patches
from lrc.solvers import Norm

POINTS = 20  # along either side


class Tucker2(KernelForm):
    """W[o, c, k] = sum over a, b of B[o, a] R[a, b, k] A[b, c]: 1 x 1 to fewer channels, the kernel, 1 x 1 to all of them.

    Two ranks, (out, in). Where one of them is that of all channels its 1 x 1 convolution is left out, so (out, all) is the
    channel factorisation and (all, in) its mirror image. The rows of A are the leading ones of the weight's input channels,
    weighed by the outputs and by the inputs' second moment along channels and along the kernel; behind them the kernel to all
    outputs is a least squares in the whole norm, and B R its truncated singular value decomposition there: the best for this A.
    Source: Kim et al. (2016), arXiv:1511.06530 (Tucker-2); De Lathauwer, De Moor & Vandewalle (2000),
    doi:10.1137/S0895479896305696 (the higher-order SVD of A). Departure: the norm, and that only A is not jointly the best.
    """

    name: ClassVar[str] = "tucker2"

    def limits(self, size: Size) -> Ranks:
        """Return all channels on either side."""
        return size[0], size[1]

    def choices(self, size: Size, round_to: int) -> list[Ranks]:
        """Return the grid, with all outputs as one more choice beside ranks that need not divide them."""
        out, into = spread(size[0], round_to, POINTS), spread(size[1], round_to, POINTS)
        pairs = [(a, b) for a in {*out, size[0]} for b in into if b < size[1]]
        return sorted(ranks for ranks in pairs if self.numbers(size, ranks) < math.prod(size))

    def shapes(self, size: Size, ranks: Ranks) -> list[Size]:
        """Return (out, a, 1 x 1), (a, b, kernel), (b, in, 1 x 1), those that are not left out."""
        (a, b), one = ranks, (1,) * (len(size) - 2)
        outer = [(size[0], a, *one)] if a < size[0] else []
        inner = [(b, size[1], *one)] if b < size[1] else []
        return [*outer, (a, b, *size[2:]), *inner]

    def geometries(self, layout: Patches, size: Size, ranks: Ranks) -> list[Geometry]:
        """Return the geometry of the kernel between 1 x 1 ones."""
        unit = Geometry.unit(len(layout.kernel))
        outer, inner = ([unit] if rank < all_ else [] for rank, all_ in zip(ranks, size[:2], strict=True))
        return [*outer, layout.geometry, *inner]

    def losses(self, norm: Norm, size: Size, choices: Sequence[Ranks]) -> Tensor:
        """Return the exact squared errors."""
        places = math.prod(size[2:])
        seen = look(norm, size)[1]
        found: dict[int, Tensor] = {}
        for b in sorted({b for _, b in choices}):
            part = seen.seen[:, : b * places]
            values = torch.linalg.eigvalsh(part @ part.T).flip(0).clamp(min=0)
            kept = torch.cat([values.new_zeros(1), values.cumsum(0)])
            found[b] = (seen.total - kept).clamp(min=0)
        return torch.stack([found[b][a] for a, b in choices])

    def kernels(self, norm: Norm, size: Size, ranks: Ranks) -> list[Tensor]:
        """Return B, R and A, those that are not left out."""
        a, b = ranks
        A, seen = look(norm, size)
        rows = b * math.prod(size[2:])
        made, part = [seen.last(rows)], seen.seen[:, :rows]
        if a < size[0]:
            U = torch.linalg.eigh(part @ part.T)[1].flip(1)[:, :a]
            outer = U if norm.left is None else norm.left.solve(U.T).T
            weighed = made[0] if norm.left is None else norm.left.apply(made[0].T).T
            made = [outer, U.T @ weighed]
        if b < size[1]:
            made.append(A[:b])
        else:  # the basis is all of them in another order
            made[-1] = torch.einsum("abk,bc->ack", made[-1].reshape(a, b, -1), A)
        return [value.reshape(shape) for value, shape in zip(made, self.shapes(size, ranks), strict=True)]


def look(norm: Norm, size: Size) -> tuple[Tensor, Behind]:
    """Return A (in, in), its rows in order of what they carry, and the target behind it; rows of the basis are (in, place)."""
    m, c = size[:2]
    places = math.prod(size[2:])
    T = norm.target if norm.left is None else norm.left.apply(norm.target.T).T
    X = T.reshape(m, c, places)
    along = marginal(norm, size, tuple(range(1, len(size) - 1)))
    X = X if along is None else X @ along
    A = leading_rows(X.transpose(1, 2).reshape(m * places, c), marginal(norm, size, (0,)))
    basis = torch.einsum("bc,vw->bvcw", A, torch.eye(places, dtype=A.dtype, device=A.device))
    return A, behind(norm, basis.reshape(c * places, c * places))
