"""Shares of a budget by the inverse logarithm of the loss, within groups of like sites: the allocation of SVD-LLM v2."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lrc.ranks.allocate import AllocatorOptions, allocator, lowest_within
from lrc.ranks.candidates import Budget, Candidates, Places, total_cost


class LossLogInverse(AllocatorOptions):
    """Shares by the inverse logarithm of the loss within sites of one kind (SVD-LLM v2)."""

    type: Literal["loss_log_inverse"] = "loss_log_inverse"


@allocator(LossLogInverse)
def shared_by_log_inverse(sites: Sequence[Candidates], options: LossLogInverse, budget: Budget) -> Places:
    """Give sites of one kind shares by the inverse logarithm of their losses."""
    return log_inverse_places(sites, budget), ()


def log_inverse_places(sites: Sequence[Candidates], budget: Budget) -> list[int]:
    """Return, for each site, the place of the dearest candidate of at most the share of its cost that its group gives it.

    Sites of one kind (the same layer of other blocks, of one shape) are a group of n; with R = 1 - budget.share what is
    removed of each, and l_i the loss at that uniform share, site i loses R_i = n R g_i / sum(g), g = 1 / log(e l_i / l_min).
    Where rounding or a site's cheapest candidate costs too much, R grows, found by halving.
    Source: Wang et al., SVD-LLM v2, NAACL 2025, arXiv:2503.12340, Algorithm 1, with departures: l is the square root of our
    loss, the Frobenius norm of theirs, relative to the group's least one times e, since the plain logarithm depends on the
    loss's unit and is negative below 1; their printed L_min stands where 1 / log(L), normalised, is meant; R_i is clamped to
    0 … 1, and what the clamp takes from one is given to the others of its group.
    """
    groups: dict[str, list[int]] = {}
    for i, site in enumerate(sites):
        groups.setdefault(site.kind, []).append(i)
    at_uniform = [float(site.losses[site.within(budget.share)]) ** 0.5 for site in sites]
    weights = {kind: weights_of(torch.tensor([at_uniform[i] for i in group])) for kind, group in groups.items()}

    def at(removed: float) -> list[int]:
        places = [0] * len(sites)
        for kind, group in groups.items():
            for i, share in zip(group, shares(weights[kind], removed).tolist(), strict=True):
                places[i] = sites[i].within(1 - share)
        return places

    low, high = max(0.0, 1 - budget.share), 1.0
    chosen = at(low)
    if total_cost(sites, chosen) <= budget.amount:
        return chosen
    return lowest_within(sites, budget.amount, at, low, high, [0] * len(sites))[0]


def weights_of(losses: Tensor) -> Tensor:
    """Return g = 1 / log(e l / l_min) of losses (n,), non-negative; of one without any loss the most, 1."""
    positive = losses[losses > 0]
    if not len(positive):
        return torch.ones(len(losses), dtype=torch.float64)
    ratio = (losses.double() / float(positive.min())).clamp(min=1)
    return 1 / (1 + ratio.log())


def shares(weights: Tensor, removed: float) -> Tensor:
    """Return what is removed of each of n like sites, (n,), in 0 … 1: in proportion to `weights`, `removed` on average."""
    left, free = removed * len(weights), torch.ones(len(weights), dtype=torch.bool)
    found = torch.ones(len(weights), dtype=torch.float64)
    for _ in range(len(weights)):
        found[free] = left * weights[free] / weights[free].sum()
        over = free & (found > 1)
        if not bool(over.any()):
            break
        found[over] = 1.0
        free &= ~over
        left = removed * len(weights) - float((~free).sum())
        if not bool(free.any()):
            break
    return found.clamp(0, 1)
