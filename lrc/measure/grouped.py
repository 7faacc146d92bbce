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
