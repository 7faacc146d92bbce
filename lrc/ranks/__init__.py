"""Rank policies and allocators: pure functions from spectra, sizes and a budget to ranks."""

from collections.abc import Sequence
from typing import Any

from lrc.ranks.allocate import ParamsKept, params_kept
from lrc.ranks.base import Choice, FixedRank, Form, RankField, RankPolicy, SiteCurve, product_size, rank_policy
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

BUILTIN: tuple[Rule[Any, Any], ...] = (fixed_rank, params_kept, energy_rank, fraction_rank, breakeven_rank)


def choose(curves: Sequence[SiteCurve], options: RankPolicy, *, allocate: str = "auto", round_to: int = 1) -> dict[str, Choice]:
    """Return every site's rank, or the reason why it stays dense.

    allocate "auto": global where the losses of different layers may be compared, else uniform.
    """
    rule = RANKS.for_options(options)
    if type(options).budget:
        if allocate == "auto":
            allocate = "global" if all(curve.additive for curve in curves) else "uniform"
        found: dict[str, Choice] = rule(curves, options, allocate=allocate, round_to=round_to)
        return found
    return {curve.name: _worth(curve, rounded(rule(curve, options), round_to)) for curve in curves}


def rounded(rank: int, round_to: int) -> int:
    """Return the largest multiple of `round_to` that is no more than `rank`, at least `round_to` itself."""
    return max(round_to, rank - rank % round_to)


def _worth(curve: SiteCurve, rank: int) -> Choice:
    """Return the rank, or dense where the product would be no smaller."""
    rank = min(rank, curve.full_rank)
    if curve.size(rank) < curve.dense_size:
        return Choice(rank)
    return Choice(None, f"rank {rank} needs {curve.size(rank)} numbers, the dense weight {curve.dense_size}")


__all__ = [
    "BUILTIN",
    "BreakevenRank",
    "Choice",
    "EnergyRank",
    "FixedRank",
    "Form",
    "FractionRank",
    "ParamsKept",
    "RankField",
    "RankPolicy",
    "SiteCurve",
    "choose",
    "product_size",
    "rank_policy",
]
