"""One option for every site, of least total loss, within a budget: a multiple-choice knapsack, solved exactly."""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix, vstack

from lrc.errors import UsageError

SECONDS = 60.0
GAP = 1e-6  # relative; the losses themselves are no more exact than this


def cheapest_choice(
    losses: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], budget: float, *, what: str = "bytes"
) -> tuple[list[int], str | None]:
    """Return the place of one option a site such that costs sum to at most `budget` and losses to the least.

    losses, costs: an entry a site, an entry an option in it, costs in one unit. The second value is a note where the time
    did not suffice to prove that nothing is better. Raises UsageError when even the cheapest options cost too much.
    Source: the integer program of LQ-LoRA, arXiv:2311.12023, section 3.2; solved by HiGHS.
    """
    least = sum(min(of_site) for of_site in costs)
    if least > budget * (1 + 1e-12):
        raise UsageError(
            "budget", expected=f"at least {least:.6g} {what}, what the smallest options need", got=f"{budget:.6g} {what}"
        )
    sizes = [len(of_site) for of_site in losses]
    rows = np.repeat(np.arange(len(sizes)), sizes)
    columns = np.arange(len(rows))
    flat = np.concatenate([np.asarray(of_site, float) for of_site in losses])
    weights = np.concatenate([np.asarray(of_site, float) for of_site in costs])
    one_each = coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(sizes), len(rows)))
    spend = coo_matrix((weights / budget, (np.zeros(len(rows), int), columns)), shape=(1, len(rows)))
    low, high = np.append(np.ones(len(sizes)), -np.inf), np.append(np.ones(len(sizes)), 1.0)
    scale = flat.max() or 1.0
    found = milp(
        flat / scale, integrality=np.ones(len(rows)), bounds=Bounds(0, 1),
        constraints=LinearConstraint(vstack([one_each, spend]).tocsr(), low, high),
        options={"time_limit": SECONDS, "mip_rel_gap": GAP},
    )  # fmt: skip
    if found.x is None:
        raise UsageError("budget", message=f"no choice was found within {SECONDS:g} s: {found.message}")
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    places = [int(found.x[s : s + n].argmax()) for s, n in zip(starts, sizes, strict=True)]
    note = (
        None if found.status == 0 else f"the time limit of {SECONDS:g} s was hit: within {found.mip_gap:.2%} of the least loss"
    )
    return places, note
