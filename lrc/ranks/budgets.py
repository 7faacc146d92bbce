"""Budgets over all sites together: an amount of numbers, bytes, FLOPs or time, shared by an allocator."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field

from lrc.errors import UsageError
from lrc.ranks.allocate import best_of, uniform_places
from lrc.ranks.base import Choice, RankPolicy, SiteCurve, rank_policy
from lrc.ranks.candidates import Budget, Candidates, Unit, total_cost

Allocator = Literal["global", "uniform"]
AllocateField = Literal["auto", "global", "uniform"]


@dataclass(frozen=True)
class Setting:
    """What stands beside a budget: who shares it, the multiple that ranks are of, and the bytes of the rest of the model."""

    allocate: Allocator
    round_to: int = 1
    rest: int = 0


@dataclass(frozen=True)
class Allocation:
    """Every site's choice, and what the plan should say of how it came about."""

    choices: dict[str, Choice]
    notes: tuple[str, ...] = ()


class BudgetPolicy(RankPolicy):
    """One amount over all targets."""

    budget: ClassVar[bool] = True


class ParamsKept(BudgetPolicy):
    """Keep a fraction of the parameters of all targets together."""

    params_kept: float = Field(gt=0, le=1, description="kept fraction of the weights' numbers, no unit")


@rank_policy(ParamsKept)
def params_kept(curves: Sequence[SiteCurve], options: ParamsKept, setting: Setting) -> Allocation:
    """Return a rank for every site such that all together need at most `options.params_kept` of the dense numbers.

    Biases are counted, before and after; index vectors are bytes, not parameters. Raises UsageError when not even the
    smallest ranks fit.
    """
    return kept_share(curves, options, "params_kept", options.params_kept, setting)


def kept_share(curves: Sequence[SiteCurve], options: RankPolicy, key: str, kept: float, setting: Setting) -> Allocation:
    """Share out a fraction of what all sites cost now in the unit of `options`."""
    sites = [curve.candidates(options.unit, setting.round_to) for curve in curves]
    fixed = sum(site.fixed for site in sites)
    whole = fixed + sum(float(site.costs[-1]) for site in sites)
    amount = kept * whole
    if options.unit != "ms":
        amount = math.floor(amount + 1e-6)
    least = fixed + total_cost(sites, [0] * len(sites))
    if least > amount:
        raise refusal(key, math.ceil(1e4 * least / whole) / 1e4, kept)
    return share_out(sites, Budget(amount - fixed, kept), setting, options.unit)


def refusal(key: str, least: float, got: float) -> UsageError:
    """Return the error of a budget that not even the smallest ranks fit."""
    return UsageError(f"rank.{key}", expected=f"at least {least:g} (the smallest ranks everywhere)", got=f"{got:g}")


ALLOCATORS: dict[Allocator, Callable[[Sequence[Candidates], Budget], list[int]]] = {
    "global": best_of,
    "uniform": uniform_places,
}
WORTH: dict[Unit, str] = {
    "numbers": "its parameters are",
    "bytes": "its bytes are",
    "flops": "its FLOPs are",
    "ms": "its time is",
}
SMALLER: dict[Unit, str] = {"numbers": "smaller", "bytes": "smaller", "flops": "cheaper", "ms": "faster"}


def share_out(sites: Sequence[Candidates], budget: Budget, setting: Setting, unit: Unit) -> Allocation:
    """Return the choices of the setting's allocator."""
    places = ALLOCATORS[setting.allocate](sites, budget)
    return Allocation({site.name: _choice(site, place, unit) for site, place in zip(sites, places, strict=True)})


def _choice(site: Candidates, place: int, unit: Unit) -> Choice:
    if place < len(site.ranks):
        return Choice(site.ranks[place], form=site.forms[place])
    if not site.ranks:
        return Choice(None, f"no rank makes it {SMALLER[unit]}")
    return Choice(None, f"the budget leaves it dense: {WORTH[unit]} worth more here than elsewhere")
