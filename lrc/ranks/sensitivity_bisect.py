"""Shares of a budget by what the model loses when one layer alone is truncated: the rank search of ASVD."""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from lrc.ranks.allocate import AllocatorOptions, allocator, lowest_within, uniform_places
from lrc.ranks.candidates import Budget, Candidates, Places, total_cost
from lrc.spec.base import SpecModel
from lrc.spec.registry import METRICS, Registered

SLOPE = 1e-6


class SensitivityBisect(AllocatorOptions):
    """Shares by sensitivity: every layer is truncated alone, and all get the share at one common loss (ASVD)."""

    type: Literal["sensitivity_bisect"] = "sensitivity_bisect"
    ratios: list[float] = Field(
        default=[0.1, 0.3, 0.5, 0.7, 0.9], min_length=1, description="Kept shares of a layer's cost at which it is measured."
    )
    metric: Annotated[SpecModel, Registered(METRICS)] | None = Field(
        default=None,
        description="What is measured, on the data of `evaluate`; without it the change of the model's outputs on the "
        "calibration data (Kullback-Leibler divergence of logits, relative squared error of others).",
    )
    measures: ClassVar[Literal["", "influence", "sensitivity"]] = "sensitivity"

    @field_validator("ratios")
    @classmethod
    def _between(cls, ratios: list[float]) -> list[float]:
        if not all(0 < ratio < 1 for ratio in ratios):
            raise ValueError("expected fractions between 0 and 1")
        return sorted(set(ratios))


@allocator(SensitivityBisect)
def shared_by_sensitivity(sites: Sequence[Candidates], options: SensitivityBisect, budget: Budget) -> Places:
    """Give every site the smallest share at which the model, with this site alone truncated, loses no more than a threshold.

    The threshold is the least that fits the budget, found by halving. Source: Yuan et al., ASVD (2023), arXiv:2312.05821,
    section 3.3 (sensitivity-based truncation rank searching). Departures: between measured ratios sensitivities are linear,
    so that the budget is used whole; they never fall as less is kept, as their noise might say. A budget below that of the
    smallest ratio everywhere is shared equally, with a note; and the default ratios reach down to 0.1, where the paper's end at
    0.4, so that small budgets are decided by measurements too.
    """
    scale = max((value for site in sites for _, value in site.evidence.sensitivity), default=0.0)
    curves = [rising(site.evidence.sensitivity, scale if scale > 0 else 1.0) for site in sites]
    top = max((float(values[-1]) for _, values in curves), default=0.0)

    def at(threshold: float) -> list[int]:
        return [place(site, *curve, threshold) for site, curve in zip(sites, curves, strict=True)]

    if total_cost(sites, at(-1.0)) <= budget.amount:
        return at(-1.0), ()
    chosen = at(top)
    if total_cost(sites, chosen) > budget.amount:
        note = f"sensitivity: the budget is below the smallest ratio, {options.ratios[0]:g}, everywhere; it is shared equally"
        return uniform_places(sites, budget), (note,)
    chosen, highest = lowest_within(sites, budget.amount, at, 0.0, top, chosen)
    return chosen, (f"sensitivity: every layer alone costs the model at most {highest:.3g}",)


def rising(sensitivity: Sequence[tuple[float, float]], scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Return shares, falling from 1, and what the model loses at them, rising from 0.

    A slope of `scale`, too small to matter, keeps what costs the model nothing from being truncated all at once.
    """
    points = sorted([(1.0, 0.0), *sensitivity], reverse=True)
    shares, values = (np.array(column) for column in zip(*points, strict=True))
    values = np.maximum.accumulate(np.maximum(values, 0.0))
    return shares, values + SLOPE * scale * (1 - shares)


def place(site: Candidates, shares: np.ndarray, values: np.ndarray, threshold: float) -> int:
    """Return the place of the dearest candidate within the smallest share whose loss is no more than `threshold`."""
    below = int(np.searchsorted(values, threshold, side="right"))  # the first that loses more
    if below == 0 or not site.ranks:
        return len(site.ranks)
    share = shares[below - 1]
    if below < len(values):
        part = (threshold - values[below - 1]) / (values[below] - values[below - 1])
        share = share + part * (shares[below] - share)
    return site.within(float(share)) if share < 1 else len(site.ranks)
