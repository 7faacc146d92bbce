"""How many units of every group stay under one budget over all targets, and which."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrc.errors import UsageError
from lrc.maps import restore
from lrc.maps.kept import keep_inputs, keep_outputs
from lrc.measure.workload import rows_per_sample, shapes_at
from lrc.program import Program
from lrc.program.dependency import Group, Groups, cut_map, living
from lrc.run import Session, Summary
from lrc.run.summary import summarize
from lrc.solvers.scores import SCORES
from lrc_passes.pruners.unit_scores import channels_of

if TYPE_CHECKING:
    from lrc_passes.pruners.structured import Structured

STEPS = 50  # of halving a share
Kept = Mapping[str, int]
Cost = Callable[[Kept], float]


@dataclass(frozen=True)
class Widths:
    """The widths that were chosen. kept: units that stay, by group; scores: of all units, by group."""

    program: Program
    all: Groups
    groups: Sequence[Group]
    scores: Mapping[str, Tensor]
    kept: Kept
    notes: list[str]

    @classmethod
    def chosen(
        cls,
        program: Program,
        session: Session,
        found: Groups,
        groups: Sequence[Group],
        scores: Mapping[str, Tensor],
        targets: Sequence[str],
        method: "Structured",
        notes: list[str],
    ) -> "Widths":
        """Choose the widest groups that the budget takes. Raises UsageError for a budget that nothing can meet."""
        whole = cls(program, found, groups, scores, {g.name: g.units for g in groups}, notes)
        if not groups:
            return cls(program, found, groups, scores, {}, [*notes, "prune: nothing among the targets can be cut"])
        cost, unit = whole.cost_in(session, targets, method)
        before = cost(whole.kept)
        most = method.amount.share * before * (1 + 1e-12)
        grain = method.round_to
        at = (
            whole.uniform(grain)
            if method.allocate == "uniform"
            else whole.by_importance(cost, grain, absolute=SCORES[method.criterion].absolute)
        )
        if cost(at(0.0)) > most:
            least = cost(at(0.0)) / before
            raise UsageError(
                "prune.method.amount", expected=f"at least {least:.4g} of the {unit} (one step of every group stays)",
                got=f"{method.amount.share:g}", hint="Raise it, or name more targets",
            )  # fmt: skip
        low, high = 0.0, 1.0
        for _ in range(STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if cost(at(middle)) <= most else (low, middle)
        kept = at(1.0) if cost(at(1.0)) <= most else at(low)
        after = cost(kept)
        said = f"prune: {unit} of the targets: {before:.0f} → {after:.0f} ({after / before:.1%} kept)"
        return cls(program, found, groups, scores, kept, [*notes, said])

    def gone(self) -> dict[str, NDArray[np.int64]]:
        """Return the units that go, by group: those of the lowest scores, rising."""
        return self.gone_with(self.kept)

    def gone_with(self, kept: Kept) -> dict[str, NDArray[np.int64]]:
        """Return the units that go where so many stay."""
        return {
            g.name: np.sort(self.scores[g.name].argsort(stable=True)[: g.units - kept[g.name]].numpy()) for g in self.groups
        }

    def uniform(self, grain: int) -> Callable[[float], Kept]:
        """Return a function from a share to as many units of every group."""
        return lambda share: {g.name: least(g.units, int(share * g.units + 1e-9), grain) for g in self.groups}

    def by_importance(self, cost: Cost, grain: int, *, absolute: bool) -> Callable[[float], Kept]:
        """Return a function from a share to the units that matter most, over all groups.

        absolute: for their cost; else relative to the mean of their group, which no cost is in proportion to.
        """
        whole = {g.name: g.units for g in self.groups}
        total = cost(whole)
        places, values = [], []
        for i, g in enumerate(self.groups):
            price = (total - cost({**whole, g.name: g.units - 1})) or 1.0
            own = self.scores[g.name]
            values.append(own / price if absolute else own / max(float(own.mean()), 1e-30))
            places.append(torch.full((g.units,), i))
        order = torch.cat(places)[torch.cat(values).argsort(descending=True, stable=True)]

        def at(share: float) -> Kept:
            counts = torch.bincount(order[: int(share * len(order) + 1e-9)], minlength=len(self.groups))
            return {g.name: least(g.units, int(counts[i]), grain) for i, g in enumerate(self.groups)}

        return at

    def cost_in(self, session: Session, targets: Sequence[str], method: "Structured") -> tuple[Cost, str]:
        """Return a function from widths to the cost of the targets, and what it counts."""
        amount = method.amount
        if amount.width_kept is not None:
            return lambda kept: float(sum(kept[g.name] for g in self.groups)), "units"
        places = {fqn: self.place(fqn) for fqn in targets}
        rows: Mapping[str, float] = dict.fromkeys(targets, 1.0)
        if amount.flops_kept is not None:
            shapes = shapes_at(self.program, session.samples(self.program), method.at)
            rows = {fqn: rows_per_sample(self.program, self.program.sites[fqn], shapes) for fqn in targets}
        name = "parameters" if amount.flops_kept is None else "flops"
        prices = {fqn: self.price(fqn, name) for fqn in targets}

        def cost(kept: Kept) -> float:
            return sum(rows[fqn] * prices[fqn](*(side(kept) for side in places[fqn])) for fqn in targets)

        return cost, "parameters" if name == "parameters" else "FLOPs per sample"

    def place(self, fqn: str) -> tuple[Callable[[Kept], float], Callable[[Kept], float]]:
        """Return two functions from widths to the shares of a site's rows and columns that stay."""

        def share(side: str) -> Callable[[Kept], float]:
            size = len(self.all.flow.ledger.slots.get(("site", fqn, side), ())) or 1
            parts = [
                (g.name, g.units, member.index.shape[1])
                for g in self.groups
                for member in g.members
                if member.slot == ("site", fqn, side)
            ]
            return lambda kept: 1 - sum((units - kept[name]) * each for name, units, each in parts) / size

        return share("out"), share("in")

    def price(self, fqn: str, name: str) -> Callable[[float, float], float]:
        """Return what a site costs at shares of its rows and columns: linear in each, as products and sums of maps are."""
        made = self.program.sites[fqn].map
        dense = float(made.cost(1).parameters)
        bias = float(made.bias.numel()) if made.bias is not None else 0.0
        if name == "flops":
            dense = float(made.cost(1).flops)
        if not hasattr(made, "slots"):
            return lambda out, read: (dense - bias) * out * read + bias * out
        m, n = self.program.sites[fqn].out_features, channels_of(self.program, fqn)
        rows, columns, both = self.corners(fqn, name, m, n)

        def bilinear(out: float, read: float) -> float:
            a, b = (1 - out) * m / (m - m // 2), (1 - read) * n / (n - n // 2)  # 0 at the whole, 1 at half
            return dense * (1 - a) * (1 - b) + rows * a * (1 - b) + columns * (1 - a) * b + both * a * b

        return bilinear

    def corners(self, fqn: str, name: str, m: int, n: int) -> tuple[float, float, float]:
        """Return the cost of a map at half of its rows, half of its columns, and both; a side that cannot be cut is whole."""
        with torch.device("meta"):
            whole: Any = restore(self.program.sites[fqn].map.structure())
        halves = [torch.arange(m // 2), torch.arange(n // 2)]
        rows = keep_outputs(whole, halves[0]) or whole
        columns = keep_inputs(whole, halves[1]) or whole
        both = keep_inputs(rows, halves[1]) or rows
        return tuple(float(getattr(part.cost(1), name)) for part in (rows, columns, both))  # type: ignore[return-value]

    def summary(self, fqn: str) -> Summary:
        """Return a site's map without what goes, in numbers."""
        site = self.program.sites[fqn]
        made = site.map
        with torch.device("meta"):
            whole = restore(made.structure()).to(made.dtype)
        for mine, theirs in zip(whole.parameters(), made.parameters(), strict=False):
            mine.requires_grad_(theirs.requires_grad)
        return summarize(cut_map(self.program, fqn, whole, self.all, living(self.all, self.gone())))


def least(units: int, wanted: int, grain: int) -> int:
    """Return how many units stay: a multiple of the grain, one step at least; all of them where that is asked for."""
    return units if wanted >= units else min(units, max(grain, wanted // grain * grain))
