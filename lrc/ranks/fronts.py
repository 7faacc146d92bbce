"""What a form costs and loses whose products have ranks of their own: a table in place of a formula."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrc.ranks.candidates import Offer, Unit

MEASURED = 8  # points of a front that are timed


@dataclass(frozen=True)
class Front:
    """Some products of one form. All tensors are (k,), float64.

    ranks: of each product, one number or more. numbers, flops: what it needs beside a bias, FLOPs for one output row.
    losses: in the unit of the site's other losses. times: ms where a budget of time asks for them, infinite where unmeasured.
    """

    form: str
    ranks: tuple[tuple[int, ...], ...]
    numbers: Tensor
    flops: Tensor
    losses: Tensor
    times: Tensor | None = None

    def place(self, ranks: tuple[int, ...]) -> int:
        """Return the place of a product."""
        return self.ranks.index(ranks)

    def best(self, round_to: int = 1) -> list[int]:
        """Return the places of products that no other one beats in numbers, FLOPs and loss, by growing numbers."""
        order = sorted(range(len(self.ranks)), key=lambda i: (float(self.numbers[i]), float(self.losses[i])))
        kept: list[int] = []
        for i in order:
            if not any(self.losses[j] <= self.losses[i] and self.flops[j] <= self.flops[i] for j in kept):
                kept.append(i)
        return kept

    def measured(self) -> list[int]:
        """Return the places of the products that are timed: a few of the best ones, evenly spread."""
        best = self.best()
        step = max(1, len(best) / MEASURED)
        return [best[int(i * step)] for i in range(min(MEASURED, len(best)))]

    def costs(self, unit: Unit, extra: int, rows: float, itemsize: int) -> Tensor:
        """Return what the products cost. extra: numbers beside them; rows: output rows a sample; itemsize: bytes a number."""
        if unit == "flops":
            return (self.flops + extra) * rows
        if unit == "ms":
            return torch.full_like(self.numbers, torch.inf) if self.times is None else self.times
        return (self.numbers + extra) * (itemsize if unit == "bytes" else 1)

    def offer(self, allowed: Tensor, costs: Tensor) -> Offer:
        """Return the products that are allowed, (k,) bool, as an offer."""
        places = allowed.nonzero()[:, 0].tolist()
        every = tuple(self.ranks[i] for i in places)
        smallest = torch.tensor([min(ranks) for ranks in every], dtype=torch.int64)
        return Offer(self.form, smallest, costs[allowed], self.losses[allowed], every)
