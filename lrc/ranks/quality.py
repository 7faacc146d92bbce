"""A budget of quality: the smallest model whose metric stays within a bound, found by bisection over what it keeps."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import Field, model_validator

from lrc.ranks.base import Choice, SiteCurve, rank_policy
from lrc.ranks.budgets import Allocation, BudgetPolicy, Setting, Tried, Verdict, within_share
from lrc.ranks.candidates import total_cost
from lrc.spec.base import SpecModel
from lrc.spec.registry import METRICS, Registered

BOUNDS = ("max_degradation", "at_least", "at_most")


class Quality(SpecModel):
    """A bound on a metric of the compressed model; the names are those of `evaluate.gates`."""

    metric: Annotated[SpecModel, Registered(METRICS)] | None = Field(
        default=None, description="A metric's name, or a mapping with `type`; without it the one of `evaluate.metrics`."
    )
    max_degradation: float | None = Field(
        default=None, ge=0, description="Largest relative loss of the metric against the original model, no unit."
    )
    at_least: float | None = Field(default=None, description="Smallest value of the metric.")
    at_most: float | None = Field(default=None, description="Largest value of the metric.")
    resolution: float = Field(
        default=0.01, gt=0, le=0.5, description="The bisection ends when the kept fraction is known within this, no unit."
    )

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        given = [name for name in BOUNDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected exactly one of {', '.join(BOUNDS)}, got {' and '.join(given) or 'none'}")
        if given == ["max_degradation"] and getattr(self.metric, "relative", False):
            name = getattr(self.metric, "type", "")
            raise ValueError(f"`{name}` compares with the original model by itself: give at_least or at_most")
        return self


class QualityBudget(BudgetPolicy):
    """Keep as few parameters as a bound on a metric allows."""

    quality: Quality = Field(description="a metric and one bound on it")


@dataclass(frozen=True)
class Search:
    """The state of a bisection: the smallest kept fraction that met the bound, and the largest that missed it."""

    met: float
    missed: float

    @property
    def middle(self) -> float:
        """Where the next step is tried."""
        return (self.met + self.missed) / 2


@rank_policy(QualityBudget)
def quality(curves: Sequence[SiteCurve], options: QualityBudget, setting: Setting) -> Allocation:
    """Return the ranks of the smallest `params_kept` that was found to meet the bound, and every step that was tried.

    setting.judge: builds the model of some choices and measures it. Between the dense model, which loses nothing, and the
    smallest ranks everywhere, the kept fraction is halved until it is known within `resolution`: 7 steps for 0.01. A metric
    that does not fall steadily has several such places, of which this is one. Where no step meets the bound, every site
    stays dense, with that as the reason.
    """
    judge = setting.judge
    assert judge is not None, "a budget of quality needs a judge"
    dense = _dense(curves, "")
    tried = [Tried("params_kept", 1.0, dense, judge(dense))]
    if not tried[0].verdict.ok:
        return _refused(curves, "the model itself misses the bound of quality", tried)
    search = bisect(curves, options.quality, setting, judge, tried)
    best = next(t for t in tried if t.amount == search.met)
    if all(choice.rank is None for choice in best.choices.values()):
        return _refused(curves, "no smaller model was found to meet the bound of quality", tried)
    note = f"quality: params_kept {best.amount:.4g} is the smallest found to meet the bound, {best.verdict.text}"
    return Allocation(best.choices, (note,), tuple(tried))


def bisect(
    curves: Sequence[SiteCurve],
    options: Quality,
    setting: Setting,
    judge: Callable[[Mapping[str, Choice]], Verdict],
    tried: list[Tried],
) -> Search:
    """Add every step to `tried`, and return where the search ended."""
    least = least_share(curves, setting.round_to)

    def meets(share: float) -> bool:
        choices = within_share(curves, "numbers", share, setting).choices
        tried.append(Tried("params_kept", share, choices, judge(choices)))
        return tried[-1].verdict.ok

    search = Search(1.0, least)
    while search.met - search.missed > options.resolution:
        middle = search.middle
        search = Search(middle, search.missed) if meets(middle) else Search(search.met, middle)
    if search.missed == least < search.met and meets(least):
        search = Search(least, least)
    return search


def least_share(curves: Sequence[SiteCurve], round_to: int) -> float:
    """Return the share of the targets' numbers that the smallest ranks everywhere need, 1 where there is none to change."""
    sites = [curve.candidates("numbers", round_to) for curve in curves]
    fixed = sum(site.fixed for site in sites)
    whole = fixed + sum(float(site.costs[-1]) for site in sites)
    return (fixed + total_cost(sites, [0] * len(sites))) / whole if whole else 1.0


def _dense(curves: Sequence[SiteCurve], reason: str) -> dict[str, Choice]:
    return {curve.name: Choice(None, reason) for curve in curves}


def _refused(curves: Sequence[SiteCurve], reason: str, tried: Sequence[Tried]) -> Allocation:
    return Allocation(_dense(curves, reason), (f"quality: everything stays dense: {reason}",), tuple(tried))
