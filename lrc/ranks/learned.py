"""Learned truncation: the mask, the budget and the rounding of positions that are trained on the model's loss.

A site's position is how many of its terms it keeps, a real number from that of its cheapest candidate to all of them. Who
trains positions has the model (`lrc.measure.truncation`); what stands here is the mathematics on numbers alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from lrc.ranks.allocate import HALVINGS, AllocatorOptions, allocator, best_of
from lrc.ranks.candidates import Budget, Candidates, Places, total_cost

Vector = np.ndarray


class LearnedAllocation(AllocatorOptions):
    """Train every layer's truncation on the model's own loss (Dobi-SVD)."""

    type: Literal["learned"] = "learned"
    steps: int = Field(default=64, ge=1, description="Gradient steps, of one calibration batch each.")
    learning_rate: float = Field(
        default=0.02, gt=0, le=1, description="Largest step of a position, as a share of the layer's full rank; falls to 0."
    )
    smoothing: float = Field(
        default=0.02, gt=0, le=1, description="Width of the mask's soft edge, as a share of the layer's full rank."
    )
    loss: Literal["auto", "labels", "model"] = Field(
        default="auto",
        description="labels: cross-entropy to the next token or the data's labels; model: the distance from what the model "
        "itself gives; auto: labels where there are some.",
    )


@allocator(LearnedAllocation)
def where_learning_starts(sites: Sequence[Candidates], options: LearnedAllocation, budget: Budget) -> Places:
    """Return where training starts for sites alone; a pass starts at `auto` and has the model to train with."""
    return best_of(sites, budget), ()


def mask(position: Tensor, count: int, width: float) -> Tensor:
    """Return the smooth truncation of `count` terms at a position, (count,), in (0, 1), falling; differentiable in it.

    position: how many terms are kept, a scalar. 0.5 tanh((position + 0.5 - i) / 2 width) + 0.5 for term i from 1. Near the
    last term the edge gets steeper, so that a position of `count` keeps every term as it is (to 5e-5).
    Source: Wang et al. (2025), Dobi-SVD, arXiv:2502.02723, eq. 4, its beta being 1 / (2 width). Departures: the edge is as
    wide as a share of the rank (at beta = 10 one term alone would have a gradient), and stands between two terms.
    """
    place = torch.arange(1, count + 1, dtype=position.dtype, device=position.device)
    steep = min(width, 0.05 + max(0.0, count - float(position.detach())) / 4)
    return torch.sigmoid((position + 0.5 - place) / steep)


@dataclass(frozen=True)
class Course:
    """What a site's positions cost: straight lines between its candidates.

    ranks, costs: of the candidates and, last, of the site as it is, at its full rank; both grow, the ranks strictly.
    """

    ranks: Vector
    costs: Vector

    @classmethod
    def of(cls, site: Candidates, full: int) -> "Course":
        """Return the course of a site that has `full` terms."""
        ranks = [rank for rank in site.ranks if rank < full]
        return cls(np.array([*ranks, full], dtype=float), np.array([*site.costs[: len(ranks)].tolist(), float(site.costs[-1])]))

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the largest position."""
        return float(self.ranks[0]), float(self.ranks[-1])

    def cost(self, position: float) -> float:
        """Return what a position costs."""
        return float(np.interp(position, self.ranks, self.costs))

    def slope(self, position: float) -> float:
        """Return what one more term costs at a position."""
        if len(self.ranks) == 1:
            return 0.0
        i = int(np.clip(np.searchsorted(self.ranks, position, side="right"), 1, len(self.ranks) - 1))
        return float((self.costs[i] - self.costs[i - 1]) / (self.ranks[i] - self.ranks[i - 1]))

    def place(self, position: float) -> int:
        """Return the last candidate at or below a position."""
        return int(np.searchsorted(self.ranks, position * (1 + 1e-12), side="right")) - 1


def fitted(courses: Sequence[Course], shares: Vector, amount: float) -> Vector:
    """Return shares of the full ranks, all moved by the same amount until they cost no more than `amount`, or just that.

    A share stays within its site's bounds. The cheapest positions of all fit the amount.
    """
    low, high = -1.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if _cost(courses, _bounded(courses, shares + middle)) <= amount:
            low = middle
        else:
            high = middle
    return _bounded(courses, shares + low)


def along(courses: Sequence[Course], shares: Vector, gradient: Vector) -> Vector:
    """Return the part of a loss's gradient by the shares that leaves the cost as it is.

    The price of the budget that is taken off is what makes the rest cost nothing: so no weight of a penalty is to be set.
    """
    steps = np.array([c.slope(s * c.bounds[1]) * c.bounds[1] for c, s in zip(courses, shares, strict=True)])
    squared = float(steps @ steps)
    return gradient if squared == 0 else gradient - (gradient @ steps) / squared * steps


def places(sites: Sequence[Candidates], courses: Sequence[Course], shares: Vector, budget: Budget) -> list[int]:
    """Return each site's candidate at or below its position; what that leaves of the budget goes to the nearest ones above.

    Never costs more than the budget, which the cheapest candidates fit.
    """
    chosen = [c.place(s * c.bounds[1]) for c, s in zip(courses, shares, strict=True)]
    chosen = [len(site.ranks) if i == len(c.ranks) - 1 else i for site, c, i in zip(sites, courses, chosen, strict=True)]
    missing = []
    for k, (course, share, i) in enumerate(zip(courses, shares, chosen, strict=True)):
        if i < len(course.ranks) - 1:
            below, above = course.ranks[i], course.ranks[i + 1]
            missing.append(((above - share * course.bounds[1]) / (above - below), k))
    while total_cost(sites, chosen) > budget.amount:  # by rounding alone
        chosen = [max(0, i - 1) for i in chosen]
    left = budget.amount - total_cost(sites, chosen)
    for _, k in sorted(missing):
        step = float(sites[k].costs[chosen[k] + 1] - sites[k].costs[chosen[k]]) if chosen[k] < len(sites[k].ranks) else 0.0
        if 0 < step <= left:
            chosen[k], left = chosen[k] + 1, left - step
    return chosen


def positions_of(sites: Sequence[Candidates], courses: Sequence[Course], chosen: Sequence[int]) -> Vector:
    """Return the shares of the full ranks at which candidates stand."""
    ranks = [
        site.ranks[i] if i < len(site.ranks) else course.bounds[1]
        for site, course, i in zip(sites, courses, chosen, strict=True)
    ]
    return np.array([rank / course.bounds[1] for rank, course in zip(ranks, courses, strict=True)])


def _cost(courses: Sequence[Course], shares: Vector) -> float:
    return sum(course.cost(share * course.bounds[1]) for course, share in zip(courses, shares, strict=True))


def _bounded(courses: Sequence[Course], shares: Vector) -> Vector:
    full = np.array([course.bounds[1] for course in courses])
    bounded: Vector = np.clip(shares, np.array([course.bounds[0] for course in courses]) / full, 1.0)
    return bounded
