"""What a form of a convolution is: the ranks that it may have, what they lose in a solver's norm, and the kernels."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lrc.maps import ConvChain, Geometry, Layout, LinearMap, Patches
from lrc.solvers import Norm

Ranks = tuple[int, ...]
Size = tuple[int, ...]  # (out_channels, in_channels, *kernel)


class KernelForm(ABC):
    """A way to store a convolution as a chain of smaller ones. `name` is the word for it in a spec and a plan.

    Every loss is exact: the squared error of the composed kernel in the norm of the solver, never that of the approximation
    by which the factors were found. So losses of all forms may be compared.
    """

    name: ClassVar[str]

    def fits(self, layout: Layout) -> bool:
        """Say whether a tensor of this layout can be stored so."""
        return isinstance(layout, Patches) and layout.geometry.groups == 1 and math.prod(layout.kernel) > 1

    @abstractmethod
    def limits(self, size: Size) -> Ranks:
        """Return the largest ranks."""

    @abstractmethod
    def shapes(self, size: Size, ranks: Ranks) -> list[Size]:
        """Return the sizes of the kernels, first the one that is applied last."""

    @abstractmethod
    def geometries(self, layout: Patches, size: Size, ranks: Ranks) -> list[Geometry]:
        """Return how the kernels move, in the same order."""

    @abstractmethod
    def losses(self, norm: Norm, size: Size, choices: Sequence[Ranks]) -> Tensor:
        """Return the squared errors in `norm` of the best kernels that are found, one for each of `choices`, float64."""

    @abstractmethod
    def kernels(self, norm: Norm, size: Size, ranks: Ranks) -> list[Tensor]:
        """Return the kernels, float64, first the one that is applied last."""

    def at(self, size: Size, rank: int) -> Ranks:
        """Return the ranks that one number stands for: it alone along every side that is as large."""
        return tuple(min(rank, limit) for limit in self.limits(size))

    @abstractmethod
    def choices(self, size: Size, round_to: int) -> list[Ranks]:
        """Return what a budget chooses among, all of it with fewer numbers than the kernel: multiples of `round_to`."""

    def numbers(self, size: Size, ranks: Ranks) -> int:
        """Return how many numbers the kernels have."""
        return sum(map(math.prod, self.shapes(size, ranks)))

    def flops(self, layout: Patches, size: Size, ranks: Ranks) -> int:
        """Return the FLOPs for one output position: what comes before a stride is needed at more of them."""
        total, positions = 0, 1
        for geometry, shape in zip(self.geometries(layout, size, ranks), self.shapes(size, ranks), strict=True):
            total += 2 * positions * math.prod(shape)
            positions *= math.prod(geometry.stride)
        return total

    def outline(self, layout: Patches, size: Size, ranks: Ranks, *, bias: bool) -> LinearMap:
        """Return the map without its numbers, on the current device."""
        kernels = [torch.empty(shape) for shape in self.shapes(size, ranks)]
        return ConvChain(kernels, self.geometries(layout, size, ranks), torch.empty(size[0]) if bias else None)

    def made(self, norm: Norm, layout: Patches, size: Size, ranks: Ranks, dtype: torch.dtype) -> ConvChain:
        """Return the map without a bias."""
        kernels = [kernel.to(dtype).contiguous() for kernel in balanced(self.kernels(norm, size, ranks))]
        return ConvChain(kernels, self.geometries(layout, size, ranks))


def spread(limit: int, round_to: int, points: int) -> list[int]:
    """Return up to `points` multiples of `round_to` from one step to `limit`, evenly spaced."""
    step = -(-limit // (points * round_to)) * round_to
    return list(range(step, limit + 1, step))


def balanced(kernels: list[Tensor]) -> list[Tensor]:
    """Return the kernels scaled to equal norms: the same product, and none of them overflows float16."""
    norms = [float(kernel.norm()) for kernel in kernels]
    if not all(norm > 0 and math.isfinite(norm) for norm in norms):
        return kernels
    level = math.prod(norms) ** (1 / len(norms))
    return [kernel * (level / norm) for kernel, norm in zip(kernels, norms, strict=True)]
