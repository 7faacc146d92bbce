"""What every site may become, tried out: each option's cost and loss, as a table on disk that every budget reads again."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lrc.maps import LinearMap, Structure
from lrc.program import Site
from lrc.ranks import OptionsCurve, Unit
from lrc.run.passes import Rewrite, Statistics
from lrc.run.plan import Summary
from lrc.run.statistics import outline_of
from lrc.run.summary import summarize
from lrc.solvers import Decomposition
from lrc.spec.registry import SOLVERS, WAYS
from lrc.ways import Target, find


@dataclass(frozen=True)
class Option:
    """One option of a site. name: what the plan calls it; loss: in nats per token; after: what it costs, bias included."""

    name: str
    loss: float
    after: Summary
    structure: Structure


@dataclass(frozen=True)
class Table:
    """The options of a site, and what its solver noted."""

    options: tuple[Option, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Return the table as text."""
        return json.dumps([[asdict(option) for option in self.options], list(self.notes)])

    @classmethod
    def from_json(cls, text: str) -> "Table":
        """Read what `to_json` wrote."""
        rows, notes = json.loads(text)
        return cls(tuple(Option(**row | {"after": Summary(**row["after"])}) for row in rows), tuple(notes))

    def place(self, name: str) -> int:
        """Return the place of an option."""
        return [option.name for option in self.options].index(name)


def target_of(site: Site, statistics: Statistics, options: Any, generator: torch.Generator) -> Target:
    """Return the weight of a site with its norm, by the solver of the pass."""
    weight, bias = site.map.dense()
    solver = options.solver.at(site.kind)
    terms = SOLVERS.for_options(solver)(weight, bias, statistics.moments, min(weight.shape), solver, generator)
    assert isinstance(terms, Decomposition)
    return Target(terms, site.dtype)


def tried(site: Site, statistics: Statistics, options: Any, generator: torch.Generator) -> Table:
    """Make every option of a site, and look at it: its loss is that of the weight that its map really stands for."""
    target = target_of(site, statistics, options, generator)
    found = []
    for of_way in options.ways:
        make = WAYS.for_options(of_way)
        for variant in of_way.variants(site.out_features, site.in_features):
            made: LinearMap | None = make(target, variant)
            if made is not None:
                loss = target.loss(made.exact().weight)
                done = target.finished(made)
                found.append(Option(variant.name, loss, summarize(done), done.structure()))
    return Table(tuple(found), target.terms.notes)


def chosen_map(site: Site, statistics: Statistics, options: Any, generator: torch.Generator) -> Rewrite:
    """Return the map of the option `options.option` of a site."""
    make, variant = find(options.ways, options.option, site.out_features, site.in_features)
    target = target_of(site, statistics, options, generator)
    return Rewrite(target.finished(make(target, variant)))


def curve_of(site: Site, table: Table) -> OptionsCurve:
    """Return what an allocator looks at: costs beside the bias that the site has now. Times are put in later."""
    outline, bias = outline_of(site, "auto", 0), site.map.bias_cost(1)
    costs: dict[Unit, torch.Tensor] = {
        "numbers": numbers([o.after.parameters - bias.parameters for o in table.options]),
        "bytes": numbers([o.after.bytes - bias.bytes for o in table.options]),
        "flops": numbers([o.after.flops - bias.flops for o in table.options]),
    }
    now: dict[Unit, float] = {unit: outline.present(unit) for unit in ("numbers", "bytes", "flops")}
    return OptionsCurve(
        site.fqn, tuple(o.name for o in table.options), numbers([o.loss for o in table.options]), costs, now
    )  # fmt: skip


def numbers(values: Sequence[float]) -> torch.Tensor:
    """Return numbers as a tensor, float64."""
    return torch.tensor(values, dtype=torch.float64)
