"""The two halves of a ranked pass whose solver decomposes several sites together: a decision is that of a group."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lrc.maps import LinearMap
from lrc.measure.operators import PRESENT, measure_operators
from lrc.measure.workload import rows_per_sample, shapes_at, shapes_per_use, typical
from lrc.program import Program
from lrc.program.absorb import absorb_places
from lrc.ranks import Choice, GroupCurve, allocate_ranks, measured_of
from lrc.run.budget import check_shapes, read_at, read_in_a_run, rest_of, spent, together, unit_of, with_latency
from lrc.run.groups import Group, GroupStore, check_rank, find_groups, maps_of, summarize_all
from lrc.run.learning import allocator
from lrc.run.plan import Decision
from lrc.run.selection import Selected, select_sites
from lrc.run.session import Session
from lrc.run.statistics import solve_all
from lrc.run.summary import summarize


def plan_groups(program: Program, session: Session, options: Any, index: int) -> list[Decision]:
    """Find the groups among the selected sites, decompose them, and let the rank policy choose one rank a group."""
    selected = {s.fqn: s for s in select_sites(program, session, options, index)}
    groups = find_groups(program, [s.fqn for s in selected.values() if not s.keep], options.solver)
    check_shapes(program, session, options)
    store = GroupStore(program, session, groups, options)
    store.solve()
    for name in store.groups:
        check_rank(options, name, store.terms(name).full_rank)
    curves = curves_of(program, session, options, store)
    found = allocate_ranks(
        list(curves.values()),
        options.rank,
        allocate=allocator(options)[0],
        round_to=options.round_to,
        rest=rest_of(program, curves),
    )
    decisions = [
        decide(program, store, group, selected, found.choices[group.name], options, index) for group in store.groups.values()
    ]
    grouped = {fqn for group in groups for fqn in group.sites}
    decisions += [alone(program, s, options, index) for s in selected.values() if s.fqn not in grouped]
    session.notices += [*found.notes, *spent(options, curves, decisions)]
    if session.pareto is not None:
        session.notices.append(
            f"pareto: no budgets are varied for `{options.solver.type}`, which takes several weights at once"
        )
    return [with_latency(options, curves, d) for d in decisions]


def alone(program: Program, selected: Selected, options: Any, index: int) -> Decision:
    """Return the decision of a site that no group has: it stays, with the reason."""
    before = summarize(program.sites[selected.fqn].map)
    reason = selected.keep or f"the solver `{options.solver.type}` finds no group that it belongs to"
    return Decision(index, options.type, (selected.fqn,), selected.rule, before, before, keep=reason)


def decide(
    program: Program, store: GroupStore, group: Group, selected: dict[str, Selected], choice: Choice, options: Any, index: int
) -> Decision:
    """Put what was chosen for one group into its decision."""
    terms = store.terms(group.name)
    before = summarize_all([program.sites[fqn].map for fqn in group.sites])
    decision = Decision(
        index, options.type, group.sites, selected[group.sites[0]].rule, before, before,
        full_rank=terms.full_rank, notes=terms.notes,
    )  # fmt: skip
    if choice.rank is None:
        return replace(decision, keep=choice.reason)
    after = summarize_all(maps_of(store.outline(group.name, choice.rank), program.sites[group.sites[0]].dtype))
    return replace(
        decision,
        after=after,
        rank=choice.rank,
        form=choice.form,
        predicted=float(terms.losses[choice.rank]),
        unit=terms.unit,
    )


def curves_of(program: Program, session: Session, options: Any, store: GroupStore) -> dict[str, GroupCurve]:
    """Return what a rank policy looks at, with what the unit of the budget asks for."""
    unit = unit_of(options)
    if unit == "flops":
        shapes = shapes_at(program, session.samples(program), options.at)
        sites = {fqn: program.sites[fqn] for group in store.groups.values() for fqn in group.sites}
        rows = {fqn: rows_per_sample(program, site, shapes) for fqn, site in sites.items()}
        return {name: store.curve(name, rows) for name in store.groups}
    curves = {name: store.curve(name) for name in store.groups}
    if unit == "ms":
        return {name: timed(program, session, options, store, curve) for name, curve in curves.items()}
    return curves


def timed(program: Program, session: Session, options: Any, store: GroupStore, curve: GroupCurve) -> GroupCurve:
    """Return a curve with the times of the group's members at the typical shapes, as they are and at some ranks."""
    at = typical(shapes_at(program, session.samples(program), options.at))
    group = store.groups[curve.name]
    ranks = measured_of(curve)
    outlines = {rank: maps_of(store.outline(curve.name, rank), program.sites[group.sites[0]].dtype) for rank in ranks}
    tables = []
    for place, fqn in enumerate(group.sites):
        site = program.sites[fqn]
        structures = {PRESENT: site.map.structure()}
        structures |= {f"{curve.form} {rank}": maps[place].structure() for rank, maps in outlines.items()}
        device = next(iter(program.tensors().values())).device
        for shape in shapes_per_use(program, site, at):
            between = read_in_a_run(program) - read_at(site)
            table = measure_operators(session.cache, structures, shape, dtype=site.dtype, device=device, between=between)
            tables.append(table)
    return replace(curve, times=together(tables))


def apply_groups(program: Program, session: Session, options: Any, decisions: Sequence[Decision]) -> list[Decision]:
    """Make the maps of every decided group from its stored terms, and put them in place."""
    work = {d.name: d for d in decisions if d.keep is None}
    found = find_groups(program, [fqn for d in work.values() for fqn in d.sites], options.solver)
    store = GroupStore(program, session, [group for group in found if group.name in work], options)
    store.solve()

    def make(name: str) -> tuple[str, list[LinearMap]]:
        rank = work[name].rank
        assert rank is not None, "a ranked decision that is not kept has a rank"
        return name, maps_of(store.parts(name, rank), program.sites[work[name].sites[0]].dtype)

    made = dict(session.track(options.type, solve_all(list(work), make, session.workers), len(work)))
    for name, d in work.items():
        for fqn, new in zip(d.sites, made[name], strict=True):
            program.replace(fqn, new, d.type, settle=False)
    notes = absorb_places(program)
    program.settle()
    return [finished(program, d, notes) for d in decisions]


def finished(program: Program, decision: Decision, notes: dict[str, str]) -> Decision:
    """Return a decision with the maps that stand there at the end."""
    if decision.keep is not None:
        return decision
    said = tuple(notes[fqn] for fqn in decision.sites if fqn in notes)
    after = summarize_all([program.map_of(fqn) for fqn in decision.sites])
    return replace(decision, after=after, notes=decision.notes + said)
