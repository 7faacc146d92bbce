"""One option for every site, of least total loss, within a budget: the multiple-choice knapsack, solved by HiGHS.

Source: Huangfu & Hall (2018), doi:10.1007/s12532-017-0130-5; for formats, the integer program of LQ-LoRA, arXiv:2311.12023,
section 3.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from lrc.errors import UsageError

SECONDS = 60.0
GAP = 1e-6  # relative; the losses themselves are no more exact than this
TOLERANCE = 2e-6  # twice the feasibility tolerance of HiGHS

Columns = Sequence[Sequence[float]]
"""An entry a site, with one for each of its options."""


@dataclass(frozen=True)
class Packing:
    """What was found. places: the option of every site, or None if none was found in time. gap: relative, None if unknown."""

    places: list[int] | None
    complete: bool
    gap: float | None


def pack_options(losses: Columns, costs: Columns, amount: float, seconds: float = SECONDS) -> Packing:
    """Return the options of least summed loss whose costs sum to at most `amount`, as far as `seconds` allow.

    losses, costs: finite; losses with a maximum above 0.
    """
    flat, prices = np.concatenate([np.asarray(c, float) for c in losses]), np.concatenate([np.asarray(c, float) for c in costs])
    owners = np.repeat(np.arange(len(losses)), [len(of_site) for of_site in losses])
    one_each = csr_matrix((np.ones(len(owners)), (owners, np.arange(len(owners)))))
    unit = max(float(prices.max()), 1e-300)
    places, found = None, None
    for slack in (0.0, TOLERANCE):  # what the solver takes for feasible may cost a little too much
        room = LinearConstraint(prices[None] / unit, -np.inf, amount / unit - slack)
        found = milp(
            flat / float(flat.max()),
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            constraints=[room, LinearConstraint(one_each, 1, 1)],
            options={"time_limit": seconds, "mip_rel_gap": GAP},
        )
        places = None if found.x is None else _chosen(found.x, [len(of_site) for of_site in losses])
        if places is None or sum(of_site[i] for of_site, i in zip(costs, places, strict=True)) <= amount:
            break
    else:
        places = None
    assert found is not None, "the program is solved at least once"
    return Packing(places, found.status == 0, found.mip_gap)


def cheapest_choice(
    losses: Columns, costs: Columns, budget: float, *, what: str = "bytes", where: str = "budget"
) -> tuple[list[int], str | None]:
    """Return the place of one option a site such that costs sum to at most `budget` and losses to the least.

    what: the unit of the costs, where: the key of the budget, for messages. The second value is a note where the time did not
    suffice to prove that nothing is better. Raises UsageError when even the cheapest options cost too much.
    """
    cheapest = [min(range(len(of_site)), key=of_site.__getitem__) for of_site in costs]
    least = sum(of_site[i] for of_site, i in zip(costs, cheapest, strict=True))
    if least > budget:
        raise UsageError(
            where, expected=f"at least {least:.6g} {what}, what the smallest options need", got=f"{budget:.6g} {what}"
        )
    if max(map(max, losses)) <= 0:
        return cheapest, None
    found = pack_options(losses, costs, budget)
    if found.places is None:
        return cheapest, f"no choice was found in {SECONDS:g} s: every site gets its smallest option"
    gap = "no bound is known" if found.gap is None else f"within {found.gap:.2%} of the least loss"
    return found.places, None if found.complete else f"the time limit of {SECONDS:g} s was hit: {gap}"


def _chosen(x: np.ndarray, sizes: Sequence[int]) -> list[int]:
    """Return the place of each site whose variable is the largest; of integers that is the one that is 1."""
    ends = np.cumsum(sizes)
    return [int(np.argmax(x[end - size : end])) for end, size in zip(ends, sizes, strict=True)]
