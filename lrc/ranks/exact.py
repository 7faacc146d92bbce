"""The least loss within a budget, by integer programming over a grid of every site's candidates."""

from collections.abc import Sequence
from typing import Literal

import torch

from lrc.ranks.allocate import AllocatorOptions, allocator, best_of
from lrc.ranks.candidates import Budget, Candidates, Places, total_cost, total_loss
from lrc.ranks.knapsack import Packing, pack_options

SECONDS = 30.0
GRID = 64  # candidates a site; beyond it the programme grows and the optimum hardly moves


class Exact(AllocatorOptions):
    """The least predicted loss, by integer programming over about 64 ranks a site; never a higher one than `global`."""

    type: Literal["exact"] = "exact"


@allocator(Exact)
def shared_exactly(sites: Sequence[Candidates], options: Exact, budget: Budget) -> Places:
    """Find the least predicted loss, starting from that of `global`."""
    return exact_places(sites, budget, best_of(sites, budget))


def exact_places(sites: Sequence[Candidates], budget: Budget, start: Sequence[int]) -> Places:
    """Return the places with the least summed loss that the solver finds in SECONDS, and a note on how good they are.

    start: places within the budget, which are returned where nothing better is found. A site with more than GRID candidates
    takes part with those of its costs evenly spread and those about its start; the optimum is that of the grid. See
    `lrc.ranks.knapsack`.
    """
    grids = [_grid(site, place) for site, place in zip(sites, start, strict=True)]
    if max((float(site.losses.max()) for site in sites), default=0.0) <= 0:
        return list(start), ()
    losses = [site.losses[grid].tolist() for site, grid in zip(sites, grids, strict=True)]
    costs = [site.costs[grid].tolist() for site, grid in zip(sites, grids, strict=True)]
    found, before = pack_options(losses, costs, budget.amount, SECONDS), total_loss(sites, start)
    places = None if found.places is None else [grid[i] for grid, i in zip(grids, found.places, strict=True)]
    if places is None or total_cost(sites, places) > budget.amount or total_loss(sites, places) >= before:
        return list(start), (_note(found, before, before),)
    return places, (_note(found, before, total_loss(sites, places)),)


def _grid(site: Candidates, start: int) -> list[int]:
    """Return the places of a site that take part: all, or about GRID spread evenly over its costs, the start among them."""
    count = len(site.costs)
    if count <= GRID:
        return list(range(count))
    even = torch.linspace(float(site.costs[0]), float(site.costs[-1]), GRID - 8, dtype=torch.float64)
    near = range(max(0, start - 3), min(count, start + 4))
    return sorted({*torch.searchsorted(site.costs, even).clamp(max=count - 1).tolist(), *near, 0, count - 1})


def _note(found: Packing, before: float, after: float) -> str:
    how = "solved" if found.complete else f"stopped after {SECONDS:g} s"
    gap = "no bound is known" if found.gap is None else f"within {found.gap:.2%} of the least loss on its grid"
    return f"exact allocation: {how}, {gap}; predicted loss {before:.4g} (global) → {after:.4g}"
