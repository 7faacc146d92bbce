"""Rank policies and allocators: pure functions from spectra, sizes and a budget to ranks."""

from collections.abc import Sequence
from typing import Any, Literal

from lrc.ranks.allocate_field import AllocateField
from lrc.ranks.base import (
    Choice,
    FixedRank,
    Form,
    ProductForm,
    RankField,
    RankPolicy,
    SiteCurve,
    Times,
    measured_ranks,
    product_size,
    rank_policy,
)
from lrc.ranks.budgets import (
    Allocation,
    Allocator,
    FlopsKept,
    LatencyKept,
    LatencyMs,
    ParamsKept,
    Search,
    Setting,
    SizeMb,
    flops_kept,
    latency_kept,
    latency_ms,
    params_kept,
    size_mb,
)
from lrc.ranks.candidates import Budget, Candidates, Offer, Unit
from lrc.ranks.contribution import Contribution, ContributionRank, contribution
from lrc.ranks.joint import GroupCurve, measured_of
from lrc.ranks.learned import LearnedAllocation
from lrc.ranks.mixed import MixedCurve
from lrc.ranks.policies import (
    BreakevenRank,
    EnergyRank,
    FractionRank,
    breakeven_rank,
    energy_rank,
    fixed_rank,
    fraction_rank,
)
from lrc.spec.registry import RANKS, Rule

BUILTIN: tuple[Rule[Any, Any], ...] = (
    fixed_rank,
    params_kept,
    energy_rank,
    fraction_rank,
    breakeven_rank,
    size_mb,
    flops_kept,
    latency_kept,
    latency_ms,
    contribution,
)


def allocate_ranks(
    curves: Sequence[SiteCurve | GroupCurve | MixedCurve],
    options: RankPolicy,
    *,
    allocate: Allocator | Literal["auto"] = "auto",
    round_to: int = 1,
    rest: int = 0,
    search: Search | None = None,
) -> Allocation:
    """Return every site's (or group's) rank and form, or the reason why it stays dense, and what there is to note.

    allocate "auto": global where the losses of different layers may be compared, else uniform. rest: bytes of the model
    beside what the sites free. search: what improves that allocation with the model at hand (`learned`).
    """
    rule = RANKS.for_options(options)
    if type(options).budget:
        if allocate == "auto":
            allocate = "global" if all(curve.additive for curve in curves) else "uniform"
        found: Allocation = rule(curves, options, Setting(allocate, round_to, rest, search))
        return found
    alone = [curve for curve in curves if not isinstance(curve, MixedCurve)]  # these are offered under a budget alone
    return Allocation({curve.name: _worth(curve, rounded(rule(curve, options), round_to)) for curve in alone})


def choose(
    curves: Sequence[SiteCurve],
    options: RankPolicy,
    *,
    allocate: Allocator | Literal["auto"] = "auto",
    round_to: int = 1,
    rest: int = 0,
) -> dict[str, Choice]:
    """Return the choices of `allocate_ranks` alone."""
    return allocate_ranks(curves, options, allocate=allocate, round_to=round_to, rest=rest).choices


def rounded(rank: int, round_to: int) -> int:
    """Return the largest multiple of `round_to` that is no more than `rank`, at least `round_to` itself."""
    return max(round_to, rank - rank % round_to)


def _worth(curve: SiteCurve | GroupCurve, rank: int) -> Choice:
    """Return the rank, or dense where the product would be no smaller."""
    rank = min(rank, curve.full_rank)
    if isinstance(curve, GroupCurve):
        nearest = curve.nearest(rank)
        if nearest is not None and curve.saves(nearest):
            return Choice(nearest, form=curve.form)
        return Choice(None, f"rank {rank} does not make the group smaller")
    if curve.size(rank) < curve.dense_size:
        return Choice(rank, form=curve.form_at(rank))
    return Choice(None, f"rank {rank} needs {curve.size(rank)} numbers, the dense weight {curve.dense_size}")


__all__ = [
    "BUILTIN",
    "AllocateField",
    "Allocation",
    "Allocator",
    "BreakevenRank",
    "Budget",
    "Candidates",
    "Choice",
    "Contribution",
    "ContributionRank",
    "EnergyRank",
    "FixedRank",
    "FlopsKept",
    "Form",
    "FractionRank",
    "GroupCurve",
    "LatencyKept",
    "LatencyMs",
    "LearnedAllocation",
    "MixedCurve",
    "Offer",
    "ParamsKept",
    "ProductForm",
    "RankField",
    "RankPolicy",
    "Search",
    "Setting",
    "SiteCurve",
    "SizeMb",
    "Times",
    "Unit",
    "allocate_ranks",
    "choose",
    "contribution",
    "measured_of",
    "measured_ranks",
    "product_size",
    "rank_policy",
]
