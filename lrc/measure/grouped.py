"""Sums over tokens for inputs in groups: only features of one group are multiplied with each other."""

import torch
from torch import Tensor

from lrc.measure.second_moments import CrossMoment, SecondMoment


class GroupedMoment:
    """The running sums of x xᵀ and x for every group; a leading dimension of groups, else as `SecondMoment`."""

    def __init__(self, groups: int, features: int) -> None:
        self.parts = [SecondMoment(features) for _ in range(groups)]

    @property
    def rows(self) -> int:
        """How many tokens were added."""
        return self.parts[0].rows

    @property
    def weight(self) -> float:
        """What they weigh together."""
        return self.parts[0].weight

    def add(self, x: Tensor, weight: float = 1.0, rows: Tensor | None = None) -> None:
        """Add the rows of x, shape (tokens, groups * features)."""
        for part, own in zip(self.parts, x.chunk(len(self.parts), 1), strict=True):
            part.add(own, weight, rows)

    def total(self) -> Tensor:
        """Return the sums of x xᵀ, (groups, features, features), float64."""
        return torch.stack([part.total() for part in self.parts])

    def column_sum(self) -> Tensor:
        """Return the sums of x, (groups, features), float64."""
        return torch.stack([part.column_sum() for part in self.parts])


class GroupedCross:
    """The running sums of x yᵀ and of x for every group, as `CrossMoment`."""

    def __init__(self, groups: int, features: int) -> None:
        self.parts = [CrossMoment(features) for _ in range(groups)]

    def add(self, left: Tensor, right: Tensor) -> None:
        """Add two tensors of shape (tokens, groups * features)."""
        groups = len(self.parts)
        for part, x, y in zip(self.parts, left.chunk(groups, 1), right.chunk(groups, 1), strict=True):
            part.add(x, y)

    @property
    def total(self) -> Tensor:
        """The sums of x yᵀ, (groups, features, features), float64."""
        return torch.stack([part.total for part in self.parts])

    @property
    def left_sum(self) -> Tensor:
        """The sums of x, (groups, features), float64."""
        return torch.stack([part.left_sum for part in self.parts])


class ExpertMoment:
    """The running sums of x xᵀ for every expert over the rows that are sent to it; a leading dimension of experts.

    What `total` gives adds up over experts as their errors do: divided by all rows it is the share of an expert times the
    mean over its rows. each: the whole sum in place of that share, the rows of an expert taken for all (output gradients
    beside which the inputs carry the share).
    """

    def __init__(self, experts: int, features: int, *, each: bool = False) -> None:
        self.parts = [SecondMoment(features) for _ in range(experts)]
        self.each = each

    @property
    def rows(self) -> int:
        """How many rows were added."""
        return sum(part.rows for part in self.parts)

    @property
    def weight(self) -> float:
        """What they weigh together."""
        return sum(part.weight for part in self.parts)

    def add(self, x: Tensor, weight: float, rows: Tensor | None, owners: Tensor) -> None:
        """Add rows (rows, features); weight, rows: see `SecondMoment`; owners: the expert of each."""
        for expert in torch.unique(owners).tolist():
            mine = owners == expert
            self.parts[expert].add(x[mine], weight, None if rows is None else rows[mine])

    def _factors(self) -> Tensor:
        rows = torch.tensor([part.rows for part in self.parts], dtype=torch.float64)
        weights = torch.tensor([part.weight for part in self.parts], dtype=torch.float64)
        share, weighs = rows / max(self.rows, 1), weights / max(self.weight, 1e-300)
        found = 1 / share if self.each else share / weighs
        return torch.where(rows * weights > 0, found, torch.zeros_like(found))

    def total(self) -> Tensor:
        """Return the sums of x xᵀ, (experts, features, features), float64."""
        parts = torch.stack([part.total() for part in self.parts])
        return parts * self._factors().to(parts.device)[:, None, None]

    def column_sum(self) -> Tensor:
        """Return the sums of x, (experts, features), float64."""
        parts = torch.stack([part.column_sum() for part in self.parts])
        return parts * self._factors().to(parts.device)[:, None]
