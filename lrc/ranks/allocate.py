"""A budget over all sites: how many parameters each one gets, by what they are worth in loss."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from lrc.errors import UsageError
from lrc.ranks.base import Choice, RankPolicy, SiteCurve, rank_policy

HALVINGS = 60


class ParamsKept(RankPolicy):
    """Keep a fraction of the parameters of all targets together."""

    params_kept: float = Field(gt=0, le=1, description="kept fraction of the weights' numbers, no unit")
    budget: ClassVar[bool] = True


@rank_policy(ParamsKept)
def params_kept(
    curves: Sequence[SiteCurve], options: ParamsKept, *, allocate: str = "global", round_to: int = 1
) -> dict[str, Choice]:
    """Return a rank for every site such that all together need at most `options.params_kept` of the dense numbers.

    allocate "uniform": the same share for every site. "global": the least summed loss, where every site's marginal loss
    per parameter is the same (see `global_ranks`); never a higher predicted loss than uniform. Biases are counted, before and
    after; index vectors are bytes, not parameters. Raises UsageError when not even the smallest ranks fit.
    """
    biases = sum(curve.bias for curve in curves)
    budget = int(options.params_kept * (biases + sum(curve.dense_size for curve in curves)) + 1e-6) - biases
    sites = [_Options.of(curve, round_to) for curve in curves]
    uniform = uniform_ranks(sites, options.params_kept)
    if allocate == "uniform":
        return _choices(sites, uniform)
    chosen = global_ranks(sites, budget)
    if chosen is None:
        least = sum(int(site.sizes[0]) for site in sites) / max(1, sum(c.dense_size for c in curves))
        raise UsageError(
            "rank.params_kept",
            expected=f"at least {least:.2g} (rank {round_to} everywhere)",
            got=f"{options.params_kept:g}",
        )
    fits = sum(int(site.sizes[i]) for site, i in zip(sites, uniform, strict=True)) <= budget
    better = fits and _total(sites, uniform) < _total(sites, chosen)
    return _choices(sites, uniform if better else chosen)


@dataclass(frozen=True)
class _Options:
    """The ranks that one site may get, in increasing size; the last entry is the dense weight, without loss."""

    curve: SiteCurve
    ranks: Tensor  # (k,), int64
    sizes: Tensor  # (k + 1,), float64, the last one dense
    losses: Tensor  # (k + 1,), float64, the last one 0

    @classmethod
    def of(cls, curve: SiteCurve, round_to: int) -> "_Options":
        top = min(len(curve.losses) - 1, curve.full_rank)
        ranks = torch.arange(round_to, top + 1, round_to)
        if not len(ranks):
            ranks = torch.tensor([top])
        sizes = curve.sizes(ranks)
        ranks, sizes = ranks[sizes < curve.dense_size], sizes[sizes < curve.dense_size]
        dense = torch.tensor([curve.dense_size])
        losses = torch.cat([curve.losses.double()[ranks], torch.zeros(1, dtype=torch.float64)])
        return cls(curve, ranks, torch.cat([sizes, dense]).double(), losses)

    def best(self, price: float) -> int:
        """Return the place of the least loss + price * size; of equal ones the smallest."""
        return int((self.losses + price * self.sizes).argmin())


def global_ranks(sites: Sequence[_Options], budget: int) -> list[int] | None:
    """Return the place of each site's choice with the least summed loss within the budget, or None if nothing fits.

    Every site minimises loss + price * size for one price of a parameter, so that marginal losses per parameter are equal;
    the price is found by halving its logarithm. What is left of the budget goes, step by step, where it saves most loss per
    parameter. Unlike plain greedy growth this sees through sizes that grow slower and slower (pivoted) and the step back
    to dense. Source: Everett (1963), doi:10.1287/opre.11.3.399 (generalised Lagrange multipliers).
    """
    if sum(float(site.sizes[0]) for site in sites) > budget:
        return None
    steepest = max((float(site.losses.max()) for site in sites), default=0.0)
    low, high = math.log(max(steepest, 1e-300)) - 80.0, math.log(max(steepest, 1e-300)) + 10.0
    chosen = [0] * len(sites)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        tried = [site.best(math.exp(middle)) for site in sites]
        if sum(float(site.sizes[i]) for site, i in zip(sites, tried, strict=True)) <= budget:
            chosen, high = tried, middle
        else:
            low = middle
    return _fill(sites, chosen, budget)


def _fill(sites: Sequence[_Options], chosen: list[int], budget: int) -> list[int]:
    """Spend the rest of the budget: the step with the most saved loss per parameter first."""
    left = budget - sum(float(site.sizes[i]) for site, i in zip(sites, chosen, strict=True))
    chosen = list(chosen)

    def step(k: int) -> tuple[float, int, int] | None:
        site, i = sites[k], chosen[k]
        room = (site.sizes[i + 1 :] - site.sizes[i] <= left).nonzero()[:, 0]
        if not len(room):
            return None
        gain = (site.losses[i] - site.losses[i + 1 :][room]) / (site.sizes[i + 1 :][room] - site.sizes[i]).clamp(min=1)
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
        left -= float(sites[k].sizes[place] - sites[k].sizes[chosen[k]])
        chosen[k] = place
        following = step(k)
        if following is not None:
            heapq.heappush(heap, following)
    return chosen


def uniform_ranks(sites: Sequence[_Options], share: float) -> list[int]:
    """Return, for each site, the place of the largest choice of at most `share` of its dense size (or its smallest one)."""
    places = []
    for site in sites:
        allowed = share * (site.curve.dense_size + site.curve.bias) - site.curve.bias
        fits = (site.sizes <= allowed + 1e-6).nonzero()[:, 0]
        places.append(int(fits[-1]) if len(fits) else 0)
    return places


def _total(sites: Sequence[_Options], places: Sequence[int]) -> float:
    return sum(float(site.losses[i]) for site, i in zip(sites, places, strict=True))


def _choices(sites: Sequence[_Options], places: Sequence[int]) -> dict[str, Choice]:
    made = {}
    for site, place in zip(sites, places, strict=True):
        if place < len(site.ranks):
            made[site.curve.name] = Choice(int(site.ranks[place]))
        else:
            made[site.curve.name] = Choice(
                None, "the budget leaves it dense: its parameters are worth more here than elsewhere"
            )
    return made
