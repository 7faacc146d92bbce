"""What is known of a group of sites that get one rank together: the losses and costs of the ranks that it may have."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lrc.ranks.base import MEASURED, NOISE, Times
from lrc.ranks.candidates import Candidates, Offer, Unit


@dataclass(frozen=True)
class GroupCurve:
    """The counterpart of `SiteCurve` for sites that are decomposed together.

    losses: joint loss at rank 0 … k, (k + 1,), float64, non-increasing; additive: in a unit that may be compared between
    groups. ranks: those that are offered, (c,), int64, rising; costs: what each of them costs, (c,), float64, by unit, biases
    counted; now: what the group costs as it is. form: what its products are called. full_rank: the largest rank.
    times: measured ones, where a budget of time asks for them.
    """

    name: str
    losses: Tensor
    ranks: Tensor
    costs: Mapping[Unit, Tensor]
    now: Mapping[Unit, float]
    form: str
    additive: bool = True
    times: Times | None = None
    kind: str = ""

    @property
    def full_rank(self) -> int:
        """The largest rank there is."""
        return len(self.losses) - 1

    @property
    def out_features(self) -> int:
        """The full rank: what a fraction of the rank is a fraction of."""
        return self.full_rank

    @property
    def in_features(self) -> int:
        """The full rank."""
        return self.full_rank

    def candidates(self, unit: Unit, round_to: int = 1) -> Candidates:
        """Return the offered ranks that cost less than the group as it is, in multiples of `round_to`, and the group as it is.

        One that takes no fewer bytes than what stands there is none, whatever it costs in another unit, nor is one whose
        measured time is not below that of the group as it is, beyond noise.
        """
        fits = (self.ranks % round_to == 0) & (self.costs["bytes"] < self.now["bytes"])
        ranks = self.ranks[fits]
        offer = Offer(self.form, ranks, self.cost(unit, self.form, ranks), self.losses.double()[ranks])
        below = self.present(unit) * (1 - NOISE if unit == "ms" else 1)
        kind = self.kind or re.sub(r"[0-9]+", "*", self.name)
        return Candidates.of(self.name, [offer], self.present(unit), below=below, kind=kind)

    def cost(self, unit: Unit, form: str, ranks: Tensor) -> Tensor:
        """Return what the group costs at offered `ranks` (r,), biases counted, (r,), float64."""
        if unit == "ms":
            assert self.times is not None, "a budget of time needs measured times"
            return self.times.at(form, ranks)
        return self.costs[unit][torch.searchsorted(self.ranks, ranks)]

    def present(self, unit: Unit) -> float:
        """Return what the group costs as it is, biases counted; the bytes are those that rewriting it frees."""
        if unit == "ms":
            assert self.times is not None, "a budget of time needs measured times"
            return self.times.present
        return self.now[unit]

    def fixed(self, unit: Unit) -> float:
        """Return 0: everything that the group costs is in its candidates."""
        return 0.0

    def nearest(self, rank: int) -> int | None:
        """Return the largest offered rank that is no more than `rank`, or None."""
        lower = self.ranks[self.ranks <= rank]
        return int(lower[-1]) if len(lower) else None

    def saves(self, rank: int) -> bool:
        """Say whether an offered rank takes fewer numbers and bytes than what stands there."""
        at = int(torch.searchsorted(self.ranks, rank))
        return all(float(self.costs[unit][at]) < self.now[unit] for unit in ("numbers", "bytes"))


def measured_of(curve: GroupCurve) -> list[int]:
    """Return the offered ranks at which a group is timed: some MEASURED of those that save bytes, evenly spaced."""
    ranks = [int(rank) for rank in curve.ranks[curve.costs["bytes"] < curve.now["bytes"]]]
    step = max(1, -(-len(ranks) // MEASURED))
    return ranks[::-1][::step][::-1]
