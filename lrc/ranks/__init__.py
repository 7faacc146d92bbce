"""Rank policies and allocators: pure functions from spectra, sizes and a budget to ranks."""

from collections.abc import Sequence
from typing import Any

from lrc.ranks.allocate import AllocateField, AllocatorOptions, Auto, settled
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
    BytesKept,
    FlopsKept,
    Judge,
    LatencyKept,
    LatencyMs,
    ParamsKept,
    Search,
    Setting,
    SizeMb,
    Tried,
    Verdict,
    bytes_kept,
    flops_kept,
    latency_kept,
    latency_ms,
    params_kept,
    size_mb,
)
from lrc.ranks.candidates import Budget, Candidates, Evidence, Offer, Unit
from lrc.ranks.contribution import Contribution, ContributionRank, contribution
from lrc.ranks.fronts import Front
from lrc.ranks.joint import GroupCurve, measured_of
from lrc.ranks.learned import LearnedAllocation
from lrc.ranks.mixed import MixedCurve
from lrc.ranks.options import OptionsCurve
from lrc.ranks.policies import (
    BreakevenRank,
    EnergyRank,
    FractionRank,
    breakeven_rank,
    energy_rank,
    fixed_rank,
    fraction_rank,
)
from lrc.ranks.quality import Quality, QualityBudget, quality
from lrc.spec.registry import RANKS, Rule

BUILTIN: tuple[Rule[Any, Any], ...] = (
    fixed_rank,
    params_kept,
    energy_rank,
    fraction_rank,
    breakeven_rank,
    size_mb,
    bytes_kept,
    flops_kept,
    latency_kept,
    latency_ms,
    quality,
    contribution,
)


def allocate_ranks(
    curves: Sequence[SiteCurve | GroupCurve | MixedCurve | OptionsCurve],
    options: RankPolicy,
    *,
    allocate: AllocatorOptions | str = "auto",
    round_to: int = 1,
    rest: int = 0,
    judge: Judge | None = None,
    search: Search | None = None,
    key: str = "rank",
) -> Allocation:
    """Return every site's (or group's) rank and form, or the reason why it stays dense, and what there is to note.

    allocate: the options of an allocator, or its name. rest: bytes of the model beside what the sites free. judge: measures
    the model of some choices, for a budget of quality. search: what improves an allocation with the model at hand (`learned`).
    key: how the spec names the budget, for messages.
    """
    rule = RANKS.for_options(options)
    if type(options).budget:
        chosen = settled(allocate, additive=all(curve.additive for curve in curves))
        found: Allocation = rule(curves, options, Setting(chosen, round_to, rest, judge, search, key))
        return found
    alone = [
        curve for curve in curves if not isinstance(curve, MixedCurve | OptionsCurve)
    ]  # these are offered under a budget alone
    return Allocation({curve.name: _worth(curve, rounded(rule(curve, options), round_to)) for curve in alone})


def choose(
    curves: Sequence[SiteCurve],
    options: RankPolicy,
    *,
    allocate: AllocatorOptions | str = "auto",
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
    if curve.only:
        return _of_front(curve, rank)
    if curve.size(rank) < curve.dense_size:
        return Choice(rank, form=curve.form_at(rank))
    return Choice(None, f"rank {rank} needs {curve.size(rank)} numbers, the dense weight {curve.dense_size}")


def _of_front(curve: SiteCurve, rank: int) -> Choice:
    """Return the smallest product of the fronts that loses no more than two factors of that rank, or else the closest one."""
    (front,) = curve.fronts
    order = front.numbers.argsort(stable=True).tolist()
    enough = [i for i in order if front.losses[i] <= curve.losses[min(rank, len(curve.losses) - 1)]]
    place = enough[0] if enough else int(front.losses.argmin())
    ranks = front.ranks[place]
    size = int(front.numbers[place]) + curve.extra
    if size < curve.dense_size:
        return Choice(min(ranks), form=front.form, ranks=ranks)
    return Choice(None, f"{front.form} of rank {ranks} needs {size} numbers, the dense weight {curve.dense_size}")


__all__ = [
    "BUILTIN",
    "AllocateField",
    "Allocation",
    "AllocatorOptions",
    "Auto",
    "BreakevenRank",
    "Budget",
    "BytesKept",
    "Candidates",
    "Choice",
    "Contribution",
    "ContributionRank",
    "EnergyRank",
    "Evidence",
    "FixedRank",
    "FlopsKept",
    "Form",
    "FractionRank",
    "Front",
    "GroupCurve",
    "Judge",
    "LatencyKept",
    "LatencyMs",
    "LearnedAllocation",
    "MixedCurve",
    "Offer",
    "OptionsCurve",
    "ParamsKept",
    "ProductForm",
    "Quality",
    "QualityBudget",
    "RankField",
    "RankPolicy",
    "Search",
    "Setting",
    "SiteCurve",
    "SizeMb",
    "Times",
    "Tried",
    "Unit",
    "Verdict",
    "allocate_ranks",
    "choose",
    "contribution",
    "measured_of",
    "measured_ranks",
    "product_size",
    "rank_policy",
]
