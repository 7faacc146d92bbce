"""A matrix with a weight at every entry: products with it are dense, and batched over its rows."""

from functools import cached_property

import torch
from torch import Tensor

from lrc.solvers.entries import close


class Elementwise:
    """A matrix and the weights of its entries, both (rows, columns), float64; weights >= 0.

    Where a weight is 0 the value is set to 0 at once, so nothing depends on it. `T` is the transpose.
    """

    def __init__(self, matrix: Tensor, weights: Tensor) -> None:
        self.weight = weights.double().contiguous()
        self.value = torch.where(self.weight > 0, matrix.double(), 0.0).contiguous()
        self.shape = (matrix.shape[0], matrix.shape[1])

    @cached_property
    def T(self) -> "Elementwise":  # noqa: N802  # as of a tensor
        """The transpose."""
        other = Elementwise(self.value.T, self.weight.T)
        other.__dict__["T"] = self
        return other

    @property
    def mean_weight(self) -> float:
        """The mean weight of all entries."""
        return float(self.weight.mean())

    @property
    def density(self) -> float:
        """The share of entries whose weight is not 0."""
        return float((self.weight > 0).double().mean())

    def means(self) -> tuple[Tensor, Tensor]:
        """Return the mean weight of every row, (rows,), and of every column, (columns,)."""
        return self.weight.mean(1), self.weight.mean(0)

    def block(self, low: int, high: int) -> "Elementwise":
        """Return the rows from `low` on and before `high`."""
        part = object.__new__(Elementwise)
        part.weight, part.value = self.weight[low:high], self.value[low:high]
        part.shape = (high - low, self.shape[1])
        return part

    def weigh(self, X: Tensor) -> Tensor:
        """Return weights @ X, X of shape (columns, width)."""
        return self.weight @ X

    def weigh_values(self, X: Tensor) -> Tensor:
        """Return (weights * values) @ X, X of shape (columns, width)."""
        return (self.weight * self.value) @ X

    def normal(self, F: Tensor, X: Tensor) -> Tensor:
        """Return the rows of (weights * (X Fᵀ)) F, X of shape (rows, rank): the normal equations' left side."""
        return (X @ F.T).mul_(self.weight) @ F

    def sketch(self, F: Tensor, size: int, generator: torch.Generator) -> Tensor:
        """Return S D_i^{1/2} F for every row i, (rows, size, rank): one CountSketch S for all rows.

        Columns fall into places of equal size, so that a place is one product; with no more than `size` columns each has a
        place of its own. Source: Clarkson & Woodruff (2013), arXiv:1207.6365.
        """
        columns = self.shape[1]
        size = min(size, columns)
        each = -(-columns // size)
        order = torch.randperm(columns, generator=generator, device=generator.device).to(F.device)
        signs = torch.randint(2, (columns,), generator=generator, device=generator.device).to(F) * 2 - 1
        gap = (0, each * size - columns)
        roots = torch.nn.functional.pad(self.weight.sqrt()[:, order], gap)
        signed = torch.nn.functional.pad((signs[:, None] * F[order]).T, gap).T
        made = torch.bmm(roots.view(-1, size, each).transpose(0, 1), signed.view(size, each, -1))
        return made.transpose(0, 1)

    def loss(self, X: Tensor, F: Tensor) -> float:
        """Return the weighted squared error of X Fᵀ; X (rows, rank), F (columns, rank)."""
        return float((self.value - X @ F.T).square_().mul_(self.weight).sum())

    def is_rank_one(self, left: Tensor, right: Tensor) -> bool:
        """Return whether the weights are left² right²ᵀ up to rounding."""
        return close(self.weight, left.square()[:, None] * right.square())

    def leading(self, left: Tensor, right: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return U (rows, rank), S, V (columns, rank): the first singular triplets of diag(left) M diag(right), exactly."""
        U, S, Vh = torch.linalg.svd(left[:, None] * self.value * right, full_matrices=False)
        return U[:, :rank], S[:rank], Vh[:rank].T
