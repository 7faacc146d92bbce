"""The least loss within a budget, by integer programming over a grid of every site's candidates."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import csr_matrix

from lrc.ranks.allocate import AllocatorOptions, allocator, best_of
from lrc.ranks.candidates import Budget, Candidates, Places, total_cost, total_loss

SECONDS = 30.0
GRID = 64  # candidates a site; beyond it the programme grows and the optimum hardly moves
GAP = 1e-6
TOLERANCE = 2e-6  # twice the feasibility tolerance of HiGHS


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
    takes part with those of its costs evenly spread and those about its start; the optimum is that of the grid. Source:
    multiple-choice knapsack, solved by HiGHS (Huangfu & Hall 2018, doi:10.1007/s12532-017-0130-5).
    """
    grids = [_grid(site, place) for site, place in zip(sites, start, strict=True)]
    scale = max((float(site.losses.max()) for site in sites), default=0.0)
    if scale <= 0:
        return list(start), ()
    losses = np.concatenate([site.losses[grid].numpy() for site, grid in zip(sites, grids, strict=True)]) / scale
    costs = np.concatenate([site.costs[grid].numpy() for site, grid in zip(sites, grids, strict=True)])
    owners = np.repeat(np.arange(len(sites)), [len(grid) for grid in grids])
    one_each = csr_matrix((np.ones(len(owners)), (owners, np.arange(len(owners)))))
    before, unit = total_loss(sites, start), max(float(costs.max()), 1e-300)
    for slack in (0.0, TOLERANCE):  # what the solver takes for feasible may cost a little too much
        room = LinearConstraint(costs[None] / unit, -np.inf, budget.amount / unit - slack)
        found = milp(
            losses,
            integrality=np.ones(len(losses)),
            bounds=Bounds(0, 1),
            constraints=[room, LinearConstraint(one_each, 1, 1)],
            options={"time_limit": SECONDS, "mip_rel_gap": GAP},
        )
        places = None if found.x is None else _chosen(found.x, grids)
        if places is None or total_cost(sites, places) <= budget.amount:
            break
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


def _chosen(x: np.ndarray, grids: Sequence[list[int]]) -> list[int]:
    """Return the place of each site whose variable is the largest; of integers that is the one that is 1."""
    places, begin = [], 0
    for grid in grids:
        places.append(grid[int(np.argmax(x[begin : begin + len(grid)]))])
        begin += len(grid)
    return places


def _note(found: OptimizeResult, before: float, after: float) -> str:
    how = f"stopped after {SECONDS:g} s" if found.status == 1 else "solved"
    gap = "no bound is known" if found.mip_gap is None else f"within {found.mip_gap:.2%} of the least loss on its grid"
    return f"exact allocation: {how}, {gap}; predicted loss {before:.4g} (global) → {after:.4g}"
