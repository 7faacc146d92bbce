"""What a site may become, and what each way costs: all that an allocator looks at."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Unit = Literal["numbers", "bytes", "flops", "ms"]


@dataclass(frozen=True)
class Evidence:
    """What was measured on the model for one site, where an allocator asks for it.

    block: the name of the repeated block that it is in, "" outside of any. influence: 1 - cosine of what that block reads
    and gives, None where that is not known. sensitivity: (kept share of the site's cost, how much worse the model is with
    this site alone at that share), larger is worse, in any one unit for all sites.
    """

    block: str = ""
    influence: float | None = None
    sensitivity: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Offer:
    """Products of one form: ranks (k,) int64, costs (k,) float64, losses (k,) float64.

    every: where products have several ranks, all of them; `ranks` then holds the smallest.
    """

    form: str
    ranks: Tensor
    costs: Tensor
    losses: Tensor
    every: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Candidates:
    """What one site may become: products by growing cost and falling loss, then the site as it is, without loss.

    ranks, forms, every: of the products, k of them (see `Offer`); only who made them reads these. costs, losses:
    (k + 1,), float64; costs grow strictly. fixed: what the site costs besides, whatever is chosen. kind: sites of one kind are
    alike (the same layer of another block). evidence: what was measured for the allocator.
    """

    name: str
    ranks: tuple[int, ...]
    forms: tuple[str, ...]
    costs: Tensor
    losses: Tensor
    fixed: float = 0.0
    kind: str = ""
    every: tuple[tuple[int, ...], ...] = ()
    evidence: Evidence = Evidence()

    @classmethod
    def of(
        cls,
        name: str,
        offers: Sequence[Offer],
        present: float,
        *,
        below: float | None = None,
        fixed: float = 0.0,
        kind: str = "",
        evidence: Evidence = Evidence(),
    ) -> "Candidates":
        """Sort offers of any forms; those that another one beats in cost and loss go, and those that cost too much.

        present: what the site costs as it is; an offer must cost less than `below`, without it than `present`.
        """
        made = [offer for offer in offers if len(offer.ranks)]
        forms = [offer.form for offer in made for _ in offer.ranks]
        every = [ranks for offer in made for ranks in offer.every or [()] * len(offer.ranks)]
        ranks = torch.cat([torch.empty(0, dtype=torch.int64), *(offer.ranks for offer in made)])
        costs = torch.cat([torch.empty(0, dtype=torch.float64), *(offer.costs for offer in made)])
        losses = torch.cat([torch.empty(0, dtype=torch.float64), *(offer.losses for offer in made)])
        order = losses.argsort(stable=True)
        order = order[costs[order].argsort(stable=True)]  # by cost, of equal ones the least loss first
        order = order[costs[order] < (present if below is None else below)]
        if len(order) > 1:
            least = losses[order].cummin(0)[0]
            order = order[torch.cat([torch.ones(1, dtype=torch.bool), losses[order][1:] < least[:-1]])]
        return cls(
            name,
            tuple(ranks[order].tolist()),
            tuple(forms[i] for i in order.tolist()),
            torch.cat([costs[order], costs.new_tensor([present])]),
            torch.cat([losses[order], losses.new_zeros(1)]),
            fixed,
            kind,
            tuple(every[i] for i in order.tolist()),
            evidence,
        )

    def best(self, price: float) -> int:
        """Return the place of the least loss + price * cost; of equal ones the cheapest."""
        return int((self.losses + price * self.costs).argmin())

    def within(self, share: float) -> int:
        """Return the place of the dearest candidate of at most `share` of what the site costs now, or of the cheapest."""
        allowed = share * (float(self.costs[-1]) + self.fixed) - self.fixed
        fits = (self.costs <= allowed + 1e-9 * float(self.costs[-1])).nonzero()[:, 0]
        return int(fits[-1]) if len(fits) else 0


@dataclass(frozen=True)
class Budget:
    """An amount of one unit of cost. amount: for all candidates, without what is fixed; share: of what there is now."""

    amount: float
    share: float


Places = tuple[list[int], tuple[str, ...]]  # one a site, and what the plan should say


def total_cost(sites: Sequence[Candidates], places: Sequence[int]) -> float:
    """Return what one candidate a site costs."""
    return sum(float(site.costs[i]) for site, i in zip(sites, places, strict=True))


def total_loss(sites: Sequence[Candidates], places: Sequence[int]) -> float:
    """Return the summed loss of one candidate a site."""
    return sum(float(site.losses[i]) for site, i in zip(sites, places, strict=True))
