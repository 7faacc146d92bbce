"""auto: every weight becomes whatever loses least under one budget over all of them.

    W  ->  W                              kept
    W  ->  Chain(B, A), Pivoted(P, Z)     factorize
    W  ->  Quantized(W)                   quantize
    W  ->  Chain of Quantized             quantized_factors
    W  ->  Sum(Chain, Quantized)          split
    W  ->  Sparse(W)                      prune

Every option of every site is made once and measured by one functional, 1/2 tr(G dW C dWᵀ) with the site's input moments C
and output gradients G: the increase of the loss in second order, which adds up over sites. One integer program chooses.
(The solver `auto` of `factorize`, which takes the fastest way to an SVD, has nothing to do with this.)
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator

from lrc.errors import LrcError
from lrc.maps import Rows
from lrc.measure.operators import NOISE, PRESENT
from lrc.measure.workload import Workload, rows_per_sample, shapes_at, typical
from lrc.program import Program
from lrc.ranks import Allocation, BytesKept, Choice, OptionsCurve, RankField, RankPolicy, Unit, allocate_ranks
from lrc.run import Decision, ProgramPass, Rewrite, Session, StoredOptions
from lrc.run.budget import rest_of, tables_of, warn
from lrc.run.points import drawn
from lrc.run.selection import Selected, select_sites
from lrc.run.session import settled
from lrc.run.solved_pass import SolvedPass, one_for_all
from lrc.run.summary import summarize
from lrc.run.sweep import check_sweep, swept
from lrc.run.ways import Table, chosen_map, curve_of, tried
from lrc.solvers import LOSS_UNIT, KfacSolver, SolverOptions
from lrc.spec.registry import SOLVERS, WAYS, Registered, Rule
from lrc.ways import WAYS_BY_DEFAULT, WayOptions

LARGE = 2**20, 2**20  # a shape at which every option that there can be is one


class Auto(StoredOptions):
    """Choose for every weight among all other passes, under one budget."""

    type: Literal["auto"] = "auto"
    budget: RankField = Field(
        description="What all targets may take together: {bytes_kept: …}, {size_mb: …} of the whole model, {latency_kept: …} "
        "or {latency_ms: …}, measured on this device."
    )
    ways: list[Annotated[WayOptions, Registered(WAYS)]] = Field(
        default=list(WAYS_BY_DEFAULT),
        min_length=1,
        description="What a weight may become beside staying as it is: names, or mappings with `type`.",
    )
    solver: Annotated[SolverOptions, Registered(SOLVERS)] = Field(
        default=KfacSolver(), description="Whose norm measures losses and fits products: `kfac`, or a mapping with that type."
    )
    at: Workload = Field(default=Workload(), description="Shapes that a budget of time counts at.")

    @model_validator(mode="after")
    def _budget_and_norm(self) -> Self:
        """Refuse amounts that are none of bytes or time, and solvers whose losses may not be compared."""
        if not (self.budget.budget and self.budget.unit in ("bytes", "ms")):
            (policy,) = type(self.budget).model_fields
            raise ValueError(f"`auto` has bytes_kept, size_mb, latency_kept and latency_ms, not `budget: {{{policy}: …}}`")
        if not isinstance(self.solver, KfacSolver):
            raise ValueError("losses of different layers and options are compared in the norm of `kfac` alone")
        if self.solver.propagate != "dense":
            raise ValueError("all options are tried on the dense model's inputs; leave `propagate` out")
        names = [variant.name for of_way in self.ways for variant in of_way.variants(*LARGE)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"`{twice[0]}` is offered twice; name every way once, with all that it may offer")
        return self


class Chosen(Auto):
    """The options for one site: the name of the option that it gets."""

    option: str


class AutoPass(SolvedPass):
    """The pass. Planning tries every option of every site, once for all budgets; applying makes those that were chosen."""

    def __init__(self) -> None:
        super().__init__(chosen_map, one_for_all)

    def plan(self, program: Program, session: Session, options: Any, index: int) -> Sequence[Decision]:
        """Try the options of every selected site, and let the integer program choose."""
        options = settled(program, options)
        check_sweep(program, session, options.budget)
        selected = [dense_only(program, chosen) for chosen in select_sites(program, session, options, index)]
        free = [s.fqn for s in selected if not s.keep]
        if options.budget.unit == "ms":
            shapes_at(program, [program.inputs.examples], options.at)  # refuses what the program does not take
        tables = self.tables(program, session, options, free)
        curves = {fqn: curve_of(program.sites[fqn], table) for fqn, table in tables.items()}
        if options.budget.unit == "ms":
            curves = timed(program, session, options, curves, tables)
        rest = rest_of(program, curves)

        def allocated(budget: RankPolicy) -> Allocation:
            return allocate_ranks(list(curves.values()), budget, allocate="exact", rest=rest, key="budget")

        def decisions_of(choices: Mapping[str, Choice]) -> list[Decision]:
            decisions = []
            for chosen in selected:
                before = summarize(program.sites[chosen.fqn].map)
                made = Decision(index, options.type, (chosen.fqn,), chosen.rule, before, before, keep=chosen.keep)
                if not chosen.keep:
                    made = decided(made, tables[chosen.fqn], curves[chosen.fqn], choices[chosen.fqn], options.budget.unit)
                decisions.append(made)
            return decisions

        def tried_out(choices: Mapping[str, Choice]) -> Program:
            clone = program.clone()
            self.apply(clone, session, options, decisions_of(choices))
            return clone

        found = allocated(options.budget)
        session.notices += found.notes
        draw = drawn(program, index, partial(flops_of, program, session, options), ms_of)
        session.points += swept(program, session, options.budget, options.type, allocated, decisions_of, tried_out, draw)
        return decisions_of(found.choices)

    def tables(self, program: Program, session: Session, options: Any, fqns: Sequence[str]) -> dict[str, Table]:
        """Return the options of every site, from the cache where they are there; they do not depend on the budget."""

        def find(key: str, fqn: str) -> Table | None:
            tensors = session.cache.get(key)
            return None if tensors is None else Table.from_json(bytes(tensors["words"].tolist()).decode())

        def keep(key: str, table: Table) -> None:
            session.cache.put(key, {"words": torch.frombuffer(bytearray(table.to_json().encode()), dtype=torch.uint8)})

        about = options.model_copy(update={"budget": BytesKept(bytes_kept=1.0), "at": Workload()})
        return self.stored(program, session, dict.fromkeys(fqns, about), "options", tried, find, keep)

    def apply(self, program: Program, session: Session, options: Any, decisions: Sequence[Decision]) -> Sequence[Decision]:
        """Put the chosen maps in place; what the cache lost is made again."""
        options = settled(program, options)
        plain = options.model_dump() | {"budget": {"bytes_kept": 1.0}, "at": {}}
        chosen = {d.sites[0]: Chosen.model_validate({**plain, "option": d.form}) for d in decisions if d.keep is None}
        made = self.made_with(program, session, chosen)
        done = []
        for d in decisions:
            rewrite = made.get(d.sites[0])
            if isinstance(rewrite, Rewrite):
                program.replace(d.sites[0], rewrite.map, d.type, settle=False)
                d = replace(d, after=summarize(rewrite.map))
            done.append(d)
        program.settle()
        return done


auto: Rule[[], ProgramPass] = Rule("auto", Auto, AutoPass)


def flops_of(program: Program, session: Session, options: Auto, decisions: Sequence[Decision]) -> float | None:
    """Return the FLOPs of the targets per sample, or None where the traced shapes do not tell the rows."""
    try:
        shapes = shapes_at(program, session.samples(program), options.at)
        return sum(d.after.flops * rows_per_sample(program, program.sites[d.sites[0]], shapes) for d in decisions)
    except LrcError:
        return None


def ms_of(decisions: Sequence[Decision]) -> float | None:
    """Return the time of the targets, or None where it was not measured."""
    times = [d.latency[1] for d in decisions if d.latency is not None]
    return sum(times) if times else None


def dense_only(program: Program, chosen: Selected) -> Selected:
    """Return what was selected, to be kept where the site is no dense linear."""
    site = program.sites[chosen.fqn]
    if chosen.keep or (isinstance(site.layout, Rows) and chosen.fqn not in program.maps):
        return chosen
    return replace(chosen, keep=f"only dense linear weights have options, this is {site.map!r}")


def timed(
    program: Program, session: Session, options: Auto, curves: Mapping[str, OptionsCurve], tables: Mapping[str, Table]
) -> dict[str, OptionsCurve]:
    """Return the curves with the measured times of all options, all uses of a site together."""
    at = typical(shapes_at(program, session.samples(program), options.at))
    structures = {
        fqn: {PRESENT: program.sites[fqn].map.structure()} | {option.name: option.structure for option in table.options}
        for fqn, table in tables.items()
    }
    found = {}
    for fqn, measured in tables_of(program, session, structures, at).items():
        times = {name: sum(table[name] for table in measured) for name in structures[fqn]}
        ms = torch.tensor([times[name] for name in curves[fqn].names], dtype=torch.float64)
        noise = max(table.get(NOISE, 0.0) for table in measured)
        costs, now = {**curves[fqn].costs, "ms": ms}, {**curves[fqn].now, "ms": times[PRESENT]}
        found[fqn] = replace(curves[fqn], costs=costs, now=now, noise=noise)
    warn(session, max((curve.noise for curve in found.values()), default=0.0))
    return found


def decided(decision: Decision, table: Table, curve: OptionsCurve, choice: Choice, unit: Unit) -> Decision:
    """Put what was chosen for one site into its decision, with its neighbours on the site's front as runners-up."""
    latency = None
    if unit == "ms":
        after = curve.now["ms"] if choice.rank is None else float(curve.costs["ms"][choice.rank])
        latency = curve.now["ms"], after
    others = [told(table, curve, place, unit) for place in curve.neighbours(unit, choice.rank) if place is not None]
    notes = (*table.notes, *([f"runners-up: {'; '.join(others)}"] if others else []))
    if choice.rank is None:
        return replace(decision, keep=choice.reason, notes=notes, latency=latency)
    option = table.options[choice.rank]
    return replace(
        decision, after=option.after, form=option.name, predicted=option.loss, unit=LOSS_UNIT, notes=notes, latency=latency
    )  # fmt: skip


def told(table: Table, curve: OptionsCurve, place: int, unit: Unit) -> str:
    """Return an option in words: its name, what it costs and what it loses."""
    cost = f"{float(curve.costs['ms'][place]):.3g} ms" if unit == "ms" else in_bytes(float(curve.costs["bytes"][place]))
    return f"{table.options[place].name} ({cost}, loss {table.options[place].loss:.3g})"


def in_bytes(value: float) -> str:
    """Return a number of bytes in kB."""
    return f"{value / 1e3:.4g} kB"
