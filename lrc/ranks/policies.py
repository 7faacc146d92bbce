"""Rank policies that look at one site alone."""

from typing import ClassVar

import torch
from pydantic import Field

from lrc.ranks.base import FixedRank, RankPolicy, SiteCurve, rank_policy


class EnergyRank(RankPolicy):
    """Keep a fraction of the squared spectrum."""

    energy: float = Field(gt=0, le=1, description="kept fraction of sum(S**2), no unit")


class FractionRank(RankPolicy):
    """Keep a fraction of the smaller dimension."""

    fraction: float = Field(gt=0, le=1, description="rank over min(in_features, out_features), no unit")
    by_shape: ClassVar[bool] = True

    def most(self, out_features: int, in_features: int) -> int:
        """Return the fraction of the smaller side, rounded down, at least 1."""
        return max(1, int(self.fraction * min(out_features, in_features) + 1e-9))


class BreakevenRank(RankPolicy):
    """Keep a fraction of the rank at which two factors are as large as the dense weight."""

    breakeven: float = Field(gt=0, le=1, description="rank over m n / (m + n), no unit")
    by_shape: ClassVar[bool] = True

    def most(self, out_features: int, in_features: int) -> int:
        """Return the fraction of the break-even rank, rounded down, at least 1."""
        m, n = out_features, in_features
        return max(1, int(self.breakeven * m * n / (m + n) + 1e-9))


@rank_policy(FixedRank)
def fixed_rank(curve: SiteCurve, options: FixedRank) -> int:
    """Return the given rank; that it is possible was checked before any weight was touched."""
    return options.rank


@rank_policy(EnergyRank)
def energy_rank(curve: SiteCurve, options: EnergyRank) -> int:
    """Return the smallest rank that keeps a fraction `options.energy` of the squared spectrum.

    curve.losses: loss at rank 0 … k, in the solver's norm; the kept energy of rank r is 1 - loss(r) / loss(0).
    Source: Eckart & Young (1936), doi:10.1007/BF02288367: the dropped energy is the squared error.
    """
    losses = curve.losses
    if float(losses[0]) <= 0:
        return 1
    kept = 1 - losses / losses[0]
    enough = kept >= options.energy - 8 * torch.finfo(losses.dtype).eps * len(losses)
    return max(1, int(enough.int().argmax())) if bool(enough.any()) else len(losses) - 1


@rank_policy(FractionRank)
def fraction_rank(curve: SiteCurve, options: FractionRank) -> int:
    """Return `options.fraction` of min(in_features, out_features), rounded down, at least 1."""
    return options.most(curve.out_features // curve.groups, curve.in_features)


@rank_policy(BreakevenRank)
def breakeven_rank(curve: SiteCurve, options: BreakevenRank) -> int:
    """Return `options.breakeven` of m n / (m + n), rounded down, at least 1."""
    return options.most(curve.out_features // curve.groups, curve.in_features)
