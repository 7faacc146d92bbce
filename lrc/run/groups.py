"""Groups of sites: how they are found, decomposed once, kept on disk, and what a rank policy sees of them.

A group solver says which sites belong together (`Grouping`); here stands how each way is found on the graph. The sites of
a group are decided, solved and rewritten as one; its name is theirs, joined.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lrc.errors import SolverError, UsageError
from lrc.maps import Chain, Dense, LinearMap, Pick, Spread
from lrc.maps.layouts import Rows
from lrc.measure import digest
from lrc.program import Program
from lrc.program.alike import alike, is_added_back
from lrc.program.modules import linked_sites
from lrc.ranks import FixedRank, GroupCurve, Unit
from lrc.run.plan import Summary
from lrc.run.session import Session
from lrc.run.statistics import generator_for, solve_all
from lrc.run.summary import stays
from lrc.solvers import LOSS_UNIT, Grouping, GroupOptions, GroupTerms, Member, Part, Places, WeightGroup
from lrc.solvers.groups import multiplied, stored_size
from lrc.spec.registry import SOLVERS

GRID = 256  # ranks of a group whose costs are looked at; larger groups offer every second, third, … one


@dataclass(frozen=True)
class Group:
    """Sites that belong together, in the order that the solver takes them. kind, facts: as of `WeightGroup`.

    narrow: what places features in a map will be absorbed, since the features go from site to site alone.
    """

    kind: str
    sites: tuple[str, ...]
    facts: Mapping[str, int] = field(default_factory=dict)
    narrow: bool = False

    @property
    def name(self) -> str:
        """The sites, joined: the name of the group's decision."""
        return "+".join(self.sites)


Finder = Callable[[Program, Sequence[str], Any], list[Group]]


def alike_groups(program: Program, fqns: Sequence[str], solver: Any) -> list[Group]:
    """Return runs of alike layers cut into groups of `group_size`; a layer that shares nothing is a group of one.

    With `share: inner` these are the layers whose output is added back to the stream of blocks: what they read differs most
    from block to block.
    """
    groups = []
    for run in alike(program, fqns):
        size = 1 if solver.share == "inner" and is_added_back(program, run[0]) else solver.group_size
        groups += [Group("alike", run[i : i + size]) for i in range(0, len(run), size)]
    return groups


def module_groups(program: Program, fqns: Sequence[str], solver: Any) -> list[Group]:
    """Return the MLPs and attentions whose linears are all among `fqns`."""
    return [Group(found.kind, found.sites, found.facts, found.kind == "mlp") for found in linked_sites(program, fqns)]


FINDERS: dict[Grouping, Finder] = {Grouping.ALIKE: alike_groups, Grouping.MODULES: module_groups}


def find_groups(program: Program, fqns: Sequence[str], solver: GroupOptions) -> list[Group]:
    """Return the groups among sites, in the order that their first sites have in the graph."""
    linears = [fqn for fqn in fqns if isinstance(program.site(fqn).layout, Rows)]
    found = FINDERS[solver.grouping](program, linears, solver)
    return sorted(found, key=lambda group: min(program.position(fqn) for fqn in group.sites))


class GroupStore:
    """The decompositions of the groups of one pass: found in the cache, or computed."""

    def __init__(self, program: Program, session: Session, groups: Sequence[Group], options: Any) -> None:
        self.program, self.session, self.options = program, session, options
        self.groups = {group.name: group for group in groups}
        self._terms: dict[str, GroupTerms] = {}
        solver = options.solver
        measured = session.measured_key(program, solver.needs, solver)
        self._keys = {
            name: digest(
                "group-1", group.kind, sorted(group.facts.items()), measured, solver.model_dump(), session.seed,
                most_terms(options), torch.__version__, *(part for fqn in group.sites for part in weight_of(program, fqn)),
            )
            for name, group in self.groups.items()
        }  # fmt: skip

    def solve(self, again: Sequence[str] = ()) -> None:
        """Decompose the groups that the cache lacks, and those named, in parallel."""
        for name, key in self._keys.items():
            small = self.session.cache.get(f"{key}-losses") if name not in again else None
            if small is not None:
                self._terms[name] = unpack(small, None)
        missing = [name for name in self.groups if name not in self._terms]
        if not missing:
            return
        needs, solver = self.options.solver.needs, self.options.solver
        sites = [fqn for group in self.groups.values() for fqn in group.sites]
        moments = self.session.moments(self.program, sites, needs, solver)
        moments(sites[0])

        def one(name: str) -> str:
            group = self.groups[name]
            members = tuple(Member(*weight_of(self.program, fqn), moments(fqn)) for fqn in group.sites)
            terms = self._solve(name, WeightGroup(group.kind, members, group.facts))
            small, large = pack(terms)
            self.session.cache.put(f"{self._keys[name]}-parts", large)
            self.session.cache.put(f"{self._keys[name]}-losses", small)
            self._terms[name] = unpack(small, None)
            return name

        for _ in self.session.track("decompose", solve_all(missing, one, self.session.workers), len(missing)):
            continue

    def _solve(self, name: str, group: WeightGroup) -> GroupTerms:
        solver = self.options.solver
        try:
            found = SOLVERS.for_options(solver)(group, most_terms(self.options), solver, generator_for(name, self.session.seed))
        except SolverError as error:
            where = f"{name}: {error.where}"
            raise SolverError(where, expected=error.expected, got=error.got, hint=error.hint, message=error.message) from error
        assert isinstance(found, GroupTerms)
        return found

    def terms(self, name: str) -> GroupTerms:
        """Return a group's terms on meta tensors: what planning needs."""
        return self._terms[name]

    def parts(self, name: str, rank: int) -> Sequence[Part]:
        """Return what `rank` makes of the members, with their numbers. Computes what the cache lost again."""
        large = self.session.cache.get(f"{self._keys[name]}-parts")
        if large is None:
            del self._terms[name]
            self.solve([name])
            large = self.session.cache.get(f"{self._keys[name]}-parts")
        found: Sequence[Part] = self.options.solver.cut(replace(self._terms[name], tensors=large or {}), rank)
        return found

    def outline(self, name: str, rank: int) -> Sequence[Part]:
        """Return what `rank` makes of the members, without numbers, and as it will stand there."""
        found: Sequence[Part] = self.options.solver.cut(self._terms[name], rank)
        if self.groups[name].narrow:
            return [Part(tuple(f for f in part.factors if isinstance(f, Tensor)), part.bias) for part in found]
        return found

    def curve(self, name: str, rows: Mapping[str, float] | None = None) -> GroupCurve:
        """Return what a rank policy looks at. rows: output rows per sample of each site, for a budget of FLOPs."""
        group, terms = self.groups[name], self._terms[name]
        sites = [self.program.sites[fqn] for fqn in group.sites]
        step = -(-terms.full_rank // GRID)
        grain = self.options.round_to
        step = -(-step // grain) * grain
        top = terms.full_rank - terms.full_rank % step
        ranks = list(range(step, top + 1, step))
        if grain == 1 and terms.full_rank not in ranks:
            ranks.append(terms.full_rank)
        fixed = self.options.rank
        if isinstance(fixed, FixedRank) and fixed.rank <= terms.full_rank:
            ranks = sorted({*ranks, fixed.rank - fixed.rank % grain or fixed.rank})
        counts = [1.0 if rows is None else rows[fqn] for fqn in group.sites]
        table: dict[Unit, list[float]] = {"numbers": [], "bytes": [], "flops": []}
        itemsize = sites[0].dtype.itemsize
        for rank in ranks:
            parts = self.outline(name, rank)
            numbers, places = stored_size(parts)
            table["numbers"].append(numbers)
            table["bytes"].append(numbers * itemsize + 4 * places)
            table["flops"].append(sum(multiplied(part) * count for part, count in zip(parts, counts, strict=True)))
        costs = [site.map.cost(1) for site in sites]
        return GroupCurve(
            name=name,
            losses=terms.losses,
            ranks=torch.tensor(ranks, dtype=torch.int64),
            costs={unit: torch.tensor(values, dtype=torch.float64) for unit, values in table.items()},
            now={
                "numbers": sum(cost.parameters for cost in costs),
                "bytes": sum(0 if stays(site) else cost.bytes for site, cost in zip(sites, costs, strict=True)),
                "flops": sum(cost.flops * count for cost, count in zip(costs, counts, strict=True)),
            },
            form=self.options.solver.form,
            additive=terms.unit == LOSS_UNIT,
        )


def weight_of(program: Program, fqn: str) -> tuple[Tensor, Tensor | None]:
    """Return the dense weight and bias at a site."""
    weight, bias = program.sites[fqn].map.dense()
    return weight, bias


def most_terms(options: Any) -> int | None:
    """Return how many terms of a group are asked for, or None for all."""
    return options.rank.rank if isinstance(options.rank, FixedRank) else None


def check_rank(options: Any, group: str, full: int) -> None:
    """Raise UsageError for a whole number that is no rank of a group."""
    if isinstance(options.rank, FixedRank) and options.rank.rank > full:
        raise UsageError(
            group, expected=f"rank <= {full}", got=str(options.rank.rank), hint="Lower `rank`, or name the sites under `ignore`"
        )


def pack(terms: GroupTerms) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split terms into what planning reads (small) and what applying reads."""
    shapes = {name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in terms.tensors.items()}
    words = json.dumps([shapes, dict(terms.facts), terms.unit, list(terms.notes)]).encode()
    return {"losses": terms.losses, "words": torch.frombuffer(bytearray(words), dtype=torch.uint8)}, dict(terms.tensors)


def unpack(small: Mapping[str, Tensor], large: Mapping[str, Tensor] | None) -> GroupTerms:
    """Put together what `pack` split; without what is large, tensors are meta tensors of the same shapes."""
    shapes, facts, unit, notes = json.loads(bytes(small["words"].tolist()))
    if large is None:
        large = {
            name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for name, (shape, dtype) in shapes.items()
        }
    return GroupTerms(small["losses"], large, facts, unit, tuple(notes))


def maps_of(parts: Sequence[Part], dtype: torch.dtype) -> list[LinearMap]:
    """Return the maps of the parts of a group in `dtype`; a matrix that several parts share is one parameter."""
    made: dict[int, torch.nn.Parameter] = {}

    def parameter(matrix: Tensor) -> torch.nn.Parameter:
        if id(matrix) not in made:
            made[id(matrix)] = torch.nn.Parameter(matrix.to(dtype, copy=True).contiguous())
        return made[id(matrix)]

    return [map_of(part, parameter, dtype) for part in parts]


def map_of(part: Part, parameter: Callable[[Tensor], torch.nn.Parameter], dtype: torch.dtype) -> LinearMap:
    """Return the map of one part: a chain, or the one matrix that it is."""
    bias = None if part.bias is None else part.bias.to(dtype, copy=True)
    slots: list[Tensor | LinearMap] = []
    for factor in part.factors:
        if isinstance(factor, Places):
            slots.append((Spread if factor.spread else Pick)(factor.index, factor.size, dtype))
        else:
            slots.append(parameter(factor))
    if isinstance(slots[0], Spread):  # a bias stands before the zeros that are put between
        inner: LinearMap = Dense(slots[1], bias) if len(slots) == 2 else Chain(*slots[1:], bias=bias)  # type: ignore[arg-type]
        return Chain(slots[0], inner)
    if len(slots) == 1:
        return Dense(slots[0], bias)  # type: ignore[arg-type]  # no place without a matrix
    return Chain(*slots, bias=bias)


def summarize_all(maps: Sequence[LinearMap]) -> Summary:
    """Return the texts and the joint cost of the maps of a group, what they share counted once; FLOPs are for one row each."""
    seen: dict[int, Tensor] = {}
    parameters = size = flops = 0
    for made in maps:
        cost = made.cost(1)
        flops += cost.flops
        again = [t for t in made.parameters() if id(t) in seen]
        parameters += cost.parameters - sum(t.numel() for t in again)
        size += cost.bytes - sum(t.numel() * t.element_size() for t in again)
        seen |= {id(t): t for t in made.parameters()}
    texts = [repr(made) for made in maps]
    counted = [f"{text} x{texts.count(text)}" if texts.count(text) > 1 else text for text in dict.fromkeys(texts)]
    return Summary(" + ".join(counted), parameters, size, flops)
