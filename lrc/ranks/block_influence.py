"""Shares of a budget by how much every repeated block changes what passes through it: the allocation of MoDeGPT."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal

from pydantic import Field

from lrc.ranks.allocate import AllocatorOptions, allocator, lowest_within
from lrc.ranks.candidates import Budget, Candidates, Places, total_cost


class BlockInfluence(AllocatorOptions):
    """Shares by block influence, 1 - cosine of what a block reads and gives on the calibration data (MoDeGPT, ShortGPT)."""

    type: Literal["block_influence"] = "block_influence"
    temperature: float = Field(
        default=0.1, gt=0, description="Of the softmax over influences, no unit: the larger, the more equal the shares."
    )
    measures: ClassVar[Literal["", "influence", "sensitivity"]] = "influence"


@allocator(BlockInfluence)
def shared_by_influence(sites: Sequence[Candidates], options: BlockInfluence, budget: Budget) -> Places:
    """Remove of every block a share in proportion to exp(-influence / temperature); within a block all sites alike.

    With s_b the influence of block b and φ_b what is removed of it, φ_b ∝ exp(-s_b / temperature), clamped to 0 … 1, and as
    little in all as the budget asks for, found by halving. A site outside of every block loses what one of mean influence
    does. Source: MoDeGPT (2024), arXiv:2408.09632, section 3.3, φ = L φ_avg softmax(-s / ε), the maximum of
    Σ s_b (1 - φ_b) + ε H(φ); s: Men et al., ShortGPT (2024), arXiv:2403.03853. Departures: what is removed counts by cost,
    since blocks need not be of one size; the clamp. ε is theirs to tune: 0.1 is of the order of the influences' differences.
    """
    known = {site.evidence.block: site.evidence.influence for site in sites if site.evidence.influence is not None}
    values = [value for value in known.values() if value is not None]
    mean = sum(values) / len(values) if values else 0.0
    removed = [-(mean if site.evidence.influence is None else site.evidence.influence) / options.temperature for site in sites]

    def at(level: float) -> list[int]:
        return [site.within(1 - min(1.0, math.exp(min(0.0, level + log)))) for site, log in zip(sites, removed, strict=True)]

    return cheapest_level(sites, budget, at, removed), (_note(known),) if known else ()


def cheapest_level(
    sites: Sequence[Candidates], budget: Budget, at: Callable[[float], list[int]], removed: Sequence[float]
) -> list[int]:
    """Return the places of the lowest level, at which least is removed, that fits the budget."""
    if total_cost(sites, [len(site.ranks) for site in sites]) <= budget.amount:
        return [len(site.ranks) for site in sites]
    low, high = -max(removed, default=0.0) - 40.0, -min(removed, default=0.0)  # nothing is removed; everything is
    return lowest_within(sites, budget.amount, at, low, high, [0] * len(sites))[0]


def _note(known: Mapping[str, float | None]) -> str:
    return "block influence: " + ", ".join(f"{block} {value:.3g}" for block, value in known.items())
