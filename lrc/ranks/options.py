"""One site and whatever it may become, where every option is a map of its own."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lrc.ranks.base import NOISE
from lrc.ranks.candidates import Candidates, Offer, Unit


@dataclass(frozen=True)
class OptionsCurve:
    """The options of one site. names: of each. losses: (k,), float64, in a unit that adds up over sites.

    costs: in every unit, of each option beside the site's bias, (k,), float64; now: of the site as it is. noise: how
    uncertain times are, relative to themselves. A choice's rank is the place of an option.
    """

    name: str
    names: tuple[str, ...]
    losses: Tensor
    costs: Mapping[Unit, Tensor]
    now: Mapping[Unit, float]
    noise: float = 0.0
    additive: bool = True

    def candidates(self, unit: Unit, round_to: int = 1) -> Candidates:
        """Return the options that take fewer bytes and cost less, beyond noise, than the site as it is, and that itself."""
        smaller = (self.costs["bytes"] < self.now["bytes"]).nonzero()[:, 0]
        below = self.present(unit) * (1 - max(NOISE, self.noise) if unit == "ms" else 1)
        offer = Offer("", smaller, self.costs[unit][smaller], self.losses[smaller])
        return Candidates.of(self.name, [offer], self.present(unit), below=below)

    def present(self, unit: Unit) -> float:
        """Return what the site costs as it is, beside its bias."""
        return self.now[unit]

    def neighbours(self, unit: Unit, place: int | None) -> tuple[int | None, int | None]:
        """Return the places of the options on the site's front before and after a choice (None: the site as it is)."""
        front = torch.tensor(self.candidates(unit).ranks, dtype=torch.int64)
        at = len(front) if place is None else int((front == place).nonzero()[0, 0])
        return (int(front[at - 1]) if at else None, int(front[at + 1]) if at + 1 < len(front) else None)
