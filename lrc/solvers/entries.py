"""A matrix of which some entries are known: every product with it takes time linear in how many there are."""

from functools import cached_property
from typing import Self

import torch
from scipy.sparse import coo_array, csr_array
from torch import Tensor

from lrc.solvers.subspace import normal

CHUNK = 1 << 17  # numbers of the factors' rows that are gathered at a time: they stay in the cache
EXTRA, POWERS = 16, 6  # of the subspace iteration that starts the search: it need not be accurate


class Entries:
    """Known entries of a matrix, sorted by row once; `T` is the same sorted by column.

    row, column: int64, (entries,), value, weight: float64, (entries,). Entries of weight 0 are dropped, so nothing depends
    on their values; an entry that is given twice counts twice. Works in float64 on the CPU.
    """

    def __init__(self, row: Tensor, column: Tensor, value: Tensor, weight: Tensor, shape: tuple[int, int]) -> None:
        kept = weight > 0
        row, column = row[kept].cpu(), column[kept].cpu()
        order = (row * shape[1] + column).argsort(stable=True)
        self.row, self.column = row[order], column[order]
        self.value, self.weight = value[kept].cpu().double()[order], weight[kept].cpu().double()[order]
        self.shape = shape
        self.start = torch.cat([torch.zeros(1, dtype=torch.int64), self.row.bincount(minlength=shape[0]).cumsum(0)])

    @classmethod
    def of(cls, matrix: Tensor, weights: Tensor) -> Self:
        """Return the entries of a dense matrix whose weight is not zero."""
        row, column = weights.nonzero(as_tuple=True)
        return cls(row, column, matrix[row, column], weights[row, column], (matrix.shape[0], matrix.shape[1]))

    @cached_property
    def T(self) -> "Entries":  # noqa: N802  # as of a tensor
        """The transpose, sorted the other way, once."""
        other = Entries(self.column, self.row, self.value, self.weight, (self.shape[1], self.shape[0]))
        other.__dict__["T"] = self
        return other

    @property
    def mean_weight(self) -> float:
        """The mean weight of all entries, the unknown ones with 0."""
        return float(self.weight.sum()) / (self.shape[0] * self.shape[1])

    @property
    def density(self) -> float:
        """The share of entries that is known."""
        return len(self.value) / (self.shape[0] * self.shape[1])

    def means(self) -> tuple[Tensor, Tensor]:
        """Return the mean weight of every row, (rows,), and of every column, (columns,), unknown entries with 0."""
        row, column = (self.weight.new_zeros(count) for count in self.shape)
        row.index_add_(0, self.row, self.weight)
        column.index_add_(0, self.column, self.weight)
        return row / self.shape[1], column / self.shape[0]

    def block(self, low: int, high: int) -> "Entries":
        """Return the rows from `low` on and before `high`."""
        part = object.__new__(Entries)
        first, last = int(self.start[low]), int(self.start[high])
        part.row, part.column = self.row[first:last] - low, self.column[first:last]
        part.value, part.weight = self.value[first:last], self.weight[first:last]
        part.start, part.shape = self.start[low : high + 1] - first, (high - low, self.shape[1])
        return part

    def weigh(self, X: Tensor) -> Tensor:
        """Return weights @ X, X of shape (columns, width)."""
        return self._times(self.weight, X)

    def weigh_values(self, X: Tensor) -> Tensor:
        """Return (weights * values) @ X, X of shape (columns, width)."""
        return self._times(self.weight * self.value, X)

    def normal(self, F: Tensor, X: Tensor) -> Tensor:
        """Return the rows of (weights * (X Fᵀ)) F, X of shape (rows, rank): the normal equations' left side."""
        return self._times(self.weight * self._product(X, F), F)

    def sketch(self, F: Tensor, size: int, generator: torch.Generator) -> Tensor:
        """Return S_i D_i^{1/2} F for every row i, (rows, size, rank): a CountSketch of each row's own entries.

        A row with no more than `size` entries is not sketched: each of its entries has a place of its own.
        Source: Clarkson & Woodruff (2013), arXiv:1207.6365.
        """
        shape, device = self.row.shape, generator.device
        drawn = torch.randint(2 * size, shape, generator=generator, device=device).cpu()
        few = self.start.diff()[self.row] <= size
        place = torch.where(few, torch.arange(len(self.row)) - self.start[self.row], drawn // 2)
        data = self.weight.sqrt() * (drawn % 2 * 2 - 1)
        at = ((self.row * size + place).numpy(), self.column.numpy())
        S = coo_array((data.numpy(), at), shape=(self.shape[0] * size, self.shape[1])).tocsr()
        return torch.from_numpy(S @ F.numpy()).view(self.shape[0], size, F.shape[1])

    def loss(self, X: Tensor, F: Tensor) -> float:
        """Return the weighted squared error of X Fᵀ; X (rows, rank), F (columns, rank)."""
        return float((self.weight * (self.value - self._product(X, F)).square()).sum())

    def is_rank_one(self, left: Tensor, right: Tensor) -> bool:
        """Return whether the weights are left² right²ᵀ: never, where entries are unknown."""
        dense = self.density == 1.0
        return dense and close(self.weight, left[self.row].square() * right[self.column].square())

    def leading(self, left: Tensor, right: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return U (rows, rank), S, V (columns, rank): about the first singular triplets of diag(left) M diag(right).

        Unknown entries count as 0. By subspace iteration: Halko, Martinsson & Tropp (2011), doi:10.1137/090771806.
        """
        width = min(rank + EXTRA, *self.shape)
        flipped = self.T
        Q = normal(width, self.shape[1], self.value, generator).T.cpu()
        for _ in range(POWERS):
            Q = torch.linalg.qr(left[:, None] * self._times(self.value, right[:, None] * Q))[0]
            Q = torch.linalg.qr(right[:, None] * flipped._times(flipped.value, left[:, None] * Q))[0]
        U, S, Vh = torch.linalg.svd(left[:, None] * self._times(self.value, right[:, None] * Q), full_matrices=False)
        return U[:, :rank], S[:rank], Q @ Vh[:rank].T

    def _times(self, data: Tensor, X: Tensor) -> Tensor:
        """Return the sparse matrix with these entries times X."""
        sparse = csr_array((data.numpy(), *self._pattern), shape=self.shape)
        return torch.from_numpy(sparse @ X.contiguous().numpy())

    @cached_property
    def _pattern(self) -> tuple[object, object]:
        small = max(len(self.value), *self.shape) < 2**31
        index = torch.int32 if small else torch.int64
        return self.column.to(index).numpy(), self.start.to(index).numpy()

    def _product(self, X: Tensor, F: Tensor) -> Tensor:
        """Return X Fᵀ at the known entries, (entries,)."""
        length = max(1, CHUNK // X.shape[1])
        parts = zip(torch.split(self.row, length), torch.split(self.column, length), strict=True)
        return torch.cat([(X.index_select(0, i) * F.index_select(0, j)).sum(1) for i, j in parts])


def close(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are the same up to the rounding of a few operations on the largest value."""
    return bool((one - other).abs().max() <= 64 * torch.finfo(one.dtype).eps * other.max())
