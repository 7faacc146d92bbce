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

    allocate "uniform": the same share for every site (see `uniform_ranks`). "global": the least summed loss, where every
    site's marginal loss per parameter is the same (see `global_ranks`); never a higher predicted loss than uniform. Biases
    are counted, before and after; index vectors are bytes, not parameters. Raises UsageError when not even the smallest
    ranks fit.
    """
    biases = sum(curve.bias for curve in curves)
    dense = biases + sum(curve.dense_size for curve in curves)
    budget = int(options.params_kept * dense + 1e-6) - biases
    sites = [_Options.of(curve, round_to) for curve in curves]
    least = _size(sites, [0] * len(sites))
    if least > budget:
        share = math.ceil(1e4 * (least + biases) / dense) / 1e4
        raise UsageError(
            "rank.params_kept", expected=f"at least {share:g} (the smallest ranks everywhere)", got=f"{options.params_kept:g}"
        )
    uniform = uniform_ranks(sites, options.params_kept, budget)
    if allocate == "uniform":
        return _choices(sites, uniform)
    chosen = global_ranks(sites, budget)
    return _choices(sites, uniform if _total(sites, uniform) < _total(sites, chosen) else chosen)


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
        ranks = torch.arange(0, top + 1, round_to)[1:]
        sizes = curve.sizes(ranks)
        ranks, sizes = ranks[sizes < curve.dense_size], sizes[sizes < curve.dense_size]
        dense = torch.tensor([curve.dense_size])
        losses = torch.cat([curve.losses.double()[ranks], torch.zeros(1, dtype=torch.float64)])
        return cls(curve, ranks, torch.cat([sizes, dense]).double(), losses)

    def best(self, price: float) -> int:
        """Return the place of the least loss + price * size; of equal ones the smallest."""
        return int((self.losses + price * self.sizes).argmin())

    def within(self, share: float) -> int:
        """Return the place of the largest choice of at most `share` of the dense numbers, or of the smallest one."""
        allowed = share * (self.curve.dense_size + self.curve.bias) - self.curve.bias
        fits = (self.sizes <= allowed + 1e-6).nonzero()[:, 0]
        return int(fits[-1]) if len(fits) else 0


def global_ranks(sites: Sequence[_Options], budget: int) -> list[int]:
    """Return the place of each site's choice with the least summed loss within the budget, which the smallest ones fit.

    Every site minimises loss + price * size for one price of a parameter, so that marginal losses per parameter are equal;
    the price is found by halving its logarithm. What is left of the budget goes, step by step, where it saves most loss per
    parameter. Unlike plain greedy growth this sees through sizes that grow slower and slower (pivoted) and the step back
    to dense. Source: Everett (1963), doi:10.1287/opre.11.3.399 (generalised Lagrange multipliers).
    """
    steepest = max((float(site.losses.max()) for site in sites), default=0.0)
    low, high = math.log(max(steepest, 1e-300)) - 80.0, math.log(max(steepest, 1e-300)) + 10.0
    chosen = [0] * len(sites)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        tried = [site.best(math.exp(middle)) for site in sites]
        if _size(sites, tried) <= budget:
            chosen, high = tried, middle
        else:
            low = middle
    return _fill(sites, chosen, budget)


def _fill(sites: Sequence[_Options], chosen: list[int], budget: int) -> list[int]:
    """Spend the rest of the budget: the step with the most saved loss per parameter first."""
    left = budget - _size(sites, chosen)
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


def uniform_ranks(sites: Sequence[_Options], share: float, budget: int) -> list[int]:
    """Return, for each site, the place of the largest choice of at most `share` of its numbers, bias included.

    A site that has none so small gets its smallest one; the others make up for it with a smaller share, found by halving.
    """
    chosen, low, high = [site.within(share) for site in sites], 0.0, share
    if _size(sites, chosen) <= budget:
        return chosen
    chosen = [0] * len(sites)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        tried = [site.within(middle) for site in sites]
        if _size(sites, tried) <= budget:
            chosen, low = tried, middle
        else:
            high = middle
    return chosen


def _size(sites: Sequence[_Options], places: Sequence[int]) -> float:
    return sum(float(site.sizes[i]) for site, i in zip(sites, places, strict=True))


def _total(sites: Sequence[_Options], places: Sequence[int]) -> float:
    return sum(float(site.losses[i]) for site, i in zip(sites, places, strict=True))


def _choices(sites: Sequence[_Options], places: Sequence[int]) -> dict[str, Choice]:
    made = {}
    for site, place in zip(sites, places, strict=True):
        if place < len(site.ranks):
            made[site.curve.name] = Choice(int(site.ranks[place]))
        elif not len(site.ranks):
            made[site.curve.name] = Choice(None, "no rank makes it smaller")
        else:
            made[site.curve.name] = Choice(
                None, "the budget leaves it dense: its parameters are worth more here than elsewhere"
            )
    return made
