"""A group of sites that may be decided one by one, each with a rank of its own, or as one, with one rank for all."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrc.ranks.base import Choice, SiteCurve
from lrc.ranks.candidates import Candidates, Offer, Unit
from lrc.ranks.joint import GroupCurve

APART = "apart"


@dataclass(frozen=True)
class MixedCurve:
    """The curves of the sites and that of the group.

    biases: what biases cost now, by unit, beside what sites count. factor: how many times a loss of the group counts.
    """

    sites: tuple[SiteCurve, ...]
    group: GroupCurve
    biases: Mapping[Unit, float]
    factor: float = 1.0

    @property
    def name(self) -> str:
        """The group's name."""
        return self.group.name

    @property
    def additive(self) -> bool:
        """Whether all losses are in the unit that may be compared."""
        return self.group.additive and all(site.additive for site in self.sites)

    def candidates(self, unit: Unit, round_to: int = 1) -> Candidates:
        """Return what the group may become: the offers of either way, by growing cost and falling loss."""
        members = [site.candidates(unit, round_to) for site in self.sites]
        steps = ladder(members)
        apart = Offer(
            APART,
            torch.arange(len(steps)),
            torch.tensor([sum(float(m.costs[i]) for m, i in zip(members, step, strict=True)) for step in steps]).double(),
            torch.tensor([sum(float(m.losses[i]) for m, i in zip(members, step, strict=True)) for step in steps]).double(),
        )
        joint = self.group.candidates(unit, round_to)
        ranks = torch.tensor(joint.ranks, dtype=torch.int64)
        count = len(ranks)
        together = Offer(self.group.form, ranks, joint.costs[:count] - self.biases[unit], self.factor * joint.losses[:count])
        present = sum(site.present(unit) for site in self.sites)
        fixed = sum(site.fixed(unit) for site in self.sites)
        return Candidates.of(self.name, [apart, together], present, fixed=fixed, kind=joint.kind)

    def apart(self, choice: Choice, unit: Unit, round_to: int = 1) -> dict[str, Choice]:
        """Return the choices of the sites, one by one, that a choice of the group stands for."""
        members = [site.candidates(unit, round_to) for site in self.sites]
        if choice.rank is None:
            return {member.name: choice for member in members}
        step = ladder(members)[choice.rank]
        found = {}
        for member, place in zip(members, step, strict=True):
            if place < len(member.ranks):
                found[member.name] = Choice(member.ranks[place], form=member.forms[place], ranks=member.every[place])
            else:
                found[member.name] = Choice(None, "the budget leaves it dense: it is worth more here than elsewhere")
        return found


def ladder(members: Sequence[Candidates]) -> list[tuple[int, ...]]:
    """Return places of all members by growing cost, each step the one that saves most loss per cost, from the cheapest on.

    Only places on the lower convex hull of a member's losses over its costs take part, so gains per cost fall.
    """
    hulls = [hull(member.costs, member.losses) for member in members]
    places = [0] * len(members)
    steps = [tuple(points[0] for points in hulls)]
    heap: list[tuple[float, int]] = []

    def push(k: int) -> None:
        points, at = hulls[k], places[k]
        if at + 1 < len(points):
            a, b = points[at], points[at + 1]
            costs, losses = members[k].costs, members[k].losses
            heapq.heappush(heap, (-float((losses[a] - losses[b]) / (costs[b] - costs[a])), k))

    for k in range(len(members)):
        push(k)
    while heap:
        _, k = heapq.heappop(heap)
        places[k] += 1
        steps.append(tuple(points[at] for points, at in zip(hulls, places, strict=True)))
        push(k)
    return steps


def hull(costs: Tensor, losses: Tensor) -> list[int]:
    """Return the places on the lower convex hull of points with rising costs and falling losses."""
    x, y = costs.tolist(), losses.tolist()
    kept: list[int] = []
    for i in range(len(x)):
        while len(kept) >= 2:
            a, b = kept[-2], kept[-1]
            if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
                break
            kept.pop()
        kept.append(i)
    return kept
