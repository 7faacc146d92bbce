"""Sums of x xᵀ over tokens: the one heavy product of calibration, done once per distinct tensor."""

import torch
from torch import Tensor

from lrc.maps.bag import Entries

BLOCK = 256  # rows of a panel: of the sizes tried, within 10 % of LAPACK's symmetric product from 384 to 1536 features


class SecondMoment:
    """The running sums over tokens of x xᵀ and x.

    The product of one batch is taken in the dtype of x (float16 and bfloat16 in float32) and added in float64, on the device
    of x. Only the panels on and above the diagonal are computed. `rows` counts the tokens, `weight` adds up what they weigh.
    """

    def __init__(self, features: int) -> None:
        self.rows = 0
        self.weight = 0.0
        self._upper = torch.zeros(features, features, dtype=torch.float64)
        self._sum = torch.zeros(features, dtype=torch.float64)

    def add(self, x: Tensor, weight: float = 1.0, rows: Tensor | None = None) -> None:
        """Add the rows of x, shape (tokens, features).

        weight scales their x xᵀ and x (several draws for one token), and rows, shape (tokens,), those of each one.
        """
        x = x.detach()
        if self._upper.device != x.device:
            self._upper, self._sum = self._upper.to(x.device), self._sum.to(x.device)
        if x.dtype in (torch.float16, torch.bfloat16):
            x = x.float()
        scaled = x if rows is None else x * rows.to(x.dtype)[:, None]
        features = x.shape[-1]
        for start in range(0, features, BLOCK):
            stop = min(start + BLOCK, features)
            self._upper[start:stop, start:].add_(scaled[:, start:stop].T @ x[:, start:], alpha=weight)
        self._sum.add_(scaled.sum(0, dtype=torch.float64), alpha=weight)
        self.weight += weight * (len(x) if rows is None else float(rows.sum(dtype=torch.float64)))
        self.rows += len(x)

    def total(self) -> Tensor:
        """Return the sum of x xᵀ, exactly symmetric, (features, features), float64."""
        upper = self._upper.triu()
        return upper.add_(self._upper.triu(1).T)

    def column_sum(self) -> Tensor:
        """Return the sum of x, (features,), float64."""
        return self._sum


class Squares:
    """The running sums over tokens of x², elementwise: the diagonal of a second moment that is too large as a whole."""

    def __init__(self, features: int) -> None:
        self._sum = torch.zeros(features, dtype=torch.float64)

    def add(self, x: Tensor, weight: float = 1.0) -> None:
        """Add the rows of x, shape (tokens, features), each counted `weight` times."""
        self._sum = self._sum.to(x.device).add_(x.detach().float().square().sum(0, dtype=torch.float64), alpha=weight)

    def total(self) -> Tensor:
        """Return the sums, (features,), float64."""
        return self._sum


class Counts:
    """The second moment of one-hot vectors x: how often every index was read. It is both the diagonal and the sum of x."""

    def __init__(self, features: int) -> None:
        self.rows = 0
        self.weight = 0.0
        self._counts = torch.zeros(features, dtype=torch.float64)

    def add(self, x: Tensor, weight: float = 1.0, rows: Tensor | None = None) -> None:
        """Add indices, shape (tokens, 1); weight and rows as for `SecondMoment`."""
        indices = x.detach().reshape(-1)
        self._counts = self._counts.to(indices.device)
        ones = torch.ones(len(indices), dtype=torch.float64, device=indices.device) if rows is None else rows.double()
        self._counts.index_add_(0, indices, ones, alpha=weight)
        self.weight += weight * float(ones.sum())
        self.rows += len(indices)

    def total(self) -> Tensor:
        """Return the diagonal of the sum of x xᵀ, (features,), float64."""
        return self._counts

    def column_sum(self) -> Tensor:
        """Return the sum of x, (features,), float64."""
        return self._counts


class BagCounts:
    """The diagonal of the second moment of bags, vectors that say how often each index was read, and their sum.

    What is off the diagonal (which indices come together) is left out: a table has a row for each index.
    """

    def __init__(self, features: int) -> None:
        self.rows = 0
        self.weight = 0.0
        self._squares = torch.zeros(features, dtype=torch.float64)
        self._sum = torch.zeros(features, dtype=torch.float64)

    def add(self, entries: Entries, weight: float = 1.0, rows: Tensor | None = None) -> None:
        """Add bags; weight and rows, (bags,), as for `SecondMoment`."""
        values = entries.values
        self._squares, self._sum = self._squares.to(values.device), self._sum.to(values.device)
        each = torch.ones(entries.number, dtype=torch.float64, device=values.device) if rows is None else rows.double()
        self._sum.index_add_(0, entries.indices, values * each[entries.bags], alpha=weight)
        self._squares.index_add_(0, entries.indices, values.square() * each[entries.bags], alpha=weight)
        self.weight += weight * float(each.sum())
        self.rows += entries.number

    def total(self) -> Tensor:
        """Return the diagonal of the sum of x xᵀ, (features,), float64."""
        return self._squares

    def column_sum(self) -> Tensor:
        """Return the sum of x, (features,), float64."""
        return self._sum


class CrossMoment:
    """The running sums over tokens of x yᵀ for two tensors with the same rows, and of y; precision as in `SecondMoment`."""

    def __init__(self, features: int) -> None:
        self.rows = 0
        self.total = torch.zeros(features, features, dtype=torch.float64)
        self.left_sum = torch.zeros(features, dtype=torch.float64)

    def add(self, left: Tensor, right: Tensor) -> None:
        """Add leftᵀ right for two tensors of shape (tokens, features)."""
        if self.total.device != left.device:
            self.total, self.left_sum = self.total.to(left.device), self.left_sum.to(left.device)
        if left.dtype in (torch.float16, torch.bfloat16):
            left, right = left.float(), right.float()
        self.total.add_(left.T @ right)
        self.left_sum.add_(left.sum(0, dtype=torch.float64))
        self.rows += left.shape[0]


def pack_symmetric(full: Tensor) -> Tensor:
    """Return the upper triangle of a symmetric (n, n) matrix, row after row, as (n (n + 1) / 2,)."""
    return torch.cat([full[row, row:] for row in range(full.shape[0])]) if full.shape[0] else full.new_empty(0)


def unpack_symmetric(packed: Tensor, features: int) -> Tensor:
    """Return the symmetric matrix of which `pack_symmetric` made `packed`."""
    full = packed.new_zeros(features, features)
    start = 0
    for row in range(features):
        stop = start + features - row
        full[row, row:] = packed[start:stop]
        start = stop
    return full.add_(full.triu(1).T)
