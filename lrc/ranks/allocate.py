"""How a budget is shared by sites that each offer candidates: functions from costs and losses to one place a site.

An allocator is such a function, `(sites, options, budget) -> (one place a site, what the plan should say)`, tied to its
options; it never spends more than the budget's amount, which the cheapest candidates fit.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal, ParamSpec, TypeVar

from lrc.ranks.candidates import Budget, Candidates, Places, total_cost, total_loss
from lrc.spec.base import Tagged
from lrc.spec.registry import ALLOCATORS, Registered, Rule

P = ParamSpec("P")
R = TypeVar("R")
HALVINGS = 60


class AllocatorOptions(Tagged):
    """Who gets what of a budget. measures: what is measured on the model before, as the candidates' evidence."""

    measures: ClassVar[Literal["", "influence", "sensitivity"]] = ""


class Auto(AllocatorOptions):
    """global where the losses of different layers may be compared (kfac), else uniform."""

    type: Literal["auto"] = "auto"


class Global(AllocatorOptions):
    """By marginal loss per cost; never a higher predicted loss than the same share everywhere."""

    type: Literal["global"] = "global"


class Uniform(AllocatorOptions):
    """The same share of its cost for every site."""

    type: Literal["uniform"] = "uniform"


def allocator(options: type[AllocatorOptions]) -> Callable[[Callable[P, R]], Rule[P, R]]:
    """Tie an allocator `(sites, options, budget) -> Places` to its options model. Registers nothing."""
    return ALLOCATORS.rule(options)


AllocateField = Annotated[AllocatorOptions, Registered(ALLOCATORS)]


@allocator(Auto)
def automatic(sites: Sequence[Candidates], options: Auto, budget: Budget) -> Places:
    """Stand for `global` or `uniform`; `settled` says which, since candidates do not know in what unit their losses are."""
    return best_of(sites, budget), ()


@allocator(Global)
def shared_globally(sites: Sequence[Candidates], options: Global, budget: Budget) -> Places:
    """Share by marginal loss per cost; never a higher predicted loss than the same share everywhere."""
    return best_of(sites, budget), ()


@allocator(Uniform)
def shared_uniformly(sites: Sequence[Candidates], options: Uniform, budget: Budget) -> Places:
    """Give every site the same share of its cost."""
    return uniform_places(sites, budget), ()


def settled(allocate: AllocatorOptions | str, *, additive: bool) -> AllocatorOptions:
    """Return the options of an allocator, by name or as they are; `auto` is settled by whether losses may be compared."""
    if isinstance(allocate, str):
        made: Any = ALLOCATORS.get(allocate).options()
        allocate = made
    if isinstance(allocate, Auto):
        return Global() if additive else Uniform()
    assert isinstance(allocate, AllocatorOptions)
    return allocate


def best_of(sites: Sequence[Candidates], budget: Budget) -> list[int]:
    """Return the `global_places`, or the `uniform_places` where these happen to lose less."""
    uniform, chosen = uniform_places(sites, budget), global_places(sites, budget.amount)
    return uniform if total_loss(sites, uniform) < total_loss(sites, chosen) else chosen


def global_places(sites: Sequence[Candidates], amount: float) -> list[int]:
    """Return the place of each site's candidate with the least summed loss within the amount, which the cheapest ones fit.

    Every site minimises loss + price * cost for one price, so that marginal losses per cost are equal; the price is found
    by halving its logarithm. What is left goes, step by step, where it saves most loss per cost. Unlike plain greedy
    growth this sees through costs that grow slower and slower (pivoted) and the step back to dense.
    Source: Everett (1963), doi:10.1287/opre.11.3.399 (generalised Lagrange multipliers).
    """
    chosen = [0] * len(sites)
    steepest = max((float(site.losses.max()) for site in sites), default=0.0)
    steps = [float(site.costs.diff().min()) for site in sites if len(site.costs) > 1]
    if not steps or steepest <= 0:
        return _fill(sites, chosen, amount)
    low = math.log(steepest) - math.log(sum(float(site.costs[-1]) for site in sites)) - 60.0
    high = math.log(steepest) - math.log(min(steps)) + 1.0  # nobody pays this for the smallest step
    chosen, _ = lowest_within(sites, amount, lambda price: [site.best(math.exp(price)) for site in sites], low, high, chosen)
    return _fill(sites, chosen, amount)


def lowest_within(
    sites: Sequence[Candidates], amount: float, at: Callable[[float], list[int]], low: float, high: float, start: list[int]
) -> tuple[list[int], float]:
    """Return the places at the lowest level in low … high whose costs fit the amount, found by halving, and that level.

    at: the places at a level, of which a higher one costs less. start: what is returned where nothing fits.
    """
    chosen = start
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        tried = at(middle)
        if total_cost(sites, tried) <= amount:
            chosen, high = tried, middle
        else:
            low = middle
    return chosen, high


def _fill(sites: Sequence[Candidates], chosen: list[int], amount: float) -> list[int]:
    """Spend the rest of the budget: the step with the most saved loss per cost first."""
    left = amount - total_cost(sites, chosen)
    chosen = list(chosen)

    def step(k: int) -> tuple[float, int, int] | None:
        site, i = sites[k], chosen[k]
        dearer = site.costs[i + 1 :] - site.costs[i]
        room = (dearer <= left).nonzero()[:, 0]
        if not len(room):
            return None
        gain = (site.losses[i] - site.losses[i + 1 :][room]) / dearer[room]
        best = int(gain.argmax())
        return (-float(gain[best]), k, i + 1 + int(room[best])) if float(gain[best]) > 0 else None

    heap = [found for k in range(len(sites)) if (found := step(k)) is not None]
    heapq.heapify(heap)
    while heap:
        gain, k, place = heapq.heappop(heap)
        now = step(k)
        if now is None:
            continue
        if now != (gain, k, place):
            heapq.heappush(heap, now)
            continue
        left -= float(sites[k].costs[place] - sites[k].costs[chosen[k]])
        chosen[k] = place
        following = step(k)
        if following is not None:
            heapq.heappush(heap, following)
    return chosen


def uniform_places(sites: Sequence[Candidates], budget: Budget) -> list[int]:
    """Return, for each site, the place of the dearest candidate of at most the budget's share of its cost, bias included.

    A site that has none so cheap gets its cheapest one; the others make up for it with a smaller share, found by halving.
    """
    chosen = [site.within(budget.share) for site in sites]
    if total_cost(sites, chosen) <= budget.amount:
        return chosen

    def less(removed: float) -> list[int]:
        return [site.within(budget.share - removed) for site in sites]

    return lowest_within(sites, budget.amount, less, 0.0, budget.share, [0] * len(sites))[0]
