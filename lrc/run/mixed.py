"""Sites that one solver decomposes one by one, beside the groups of them that another makes smaller as one.

Both predict their losses in nats per token, from the same statistics. So one allocator decides, group by group, which way
loses less at its share of the budget.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lrc.program import Program
from lrc.ranks import Choice, GroupCurve, MixedCurve, SiteCurve
from lrc.ranks.mixed import APART
from lrc.run.budget import unit_of
from lrc.run.group_pass import curves_of, decide
from lrc.run.groups import GroupStore, find_groups
from lrc.run.learning import allocator
from lrc.run.plan import Decision
from lrc.run.selection import Selected
from lrc.run.session import Session
from lrc.solvers import GroupOptions


@dataclass(frozen=True)
class Offers:
    """What a budget is shared among. curves: of sites and of groups of them; joint: those of the groups alone, by name.

    placed: turns choices into those of sites that are decided one by one, and the decisions of groups.
    """

    curves: Sequence[SiteCurve | MixedCurve]
    joint: Mapping[str, GroupCurve]
    placed: Callable[[Mapping[str, Choice]], tuple[dict[str, Choice], list[Decision]]]


def modules_of(program: Program, options: Any) -> GroupOptions | None:
    """Return the solver of groups that a pass offers beside its own, or None."""
    made: GroupOptions | None = options.solver.modules_solver() if hasattr(options.solver, "modules_solver") else None
    offered = options.rank.budget and unit_of(options) != "ms" and options.form == "auto"
    return made if offered and getattr(options.solver, "propagate", "dense") == "dense" else None


def with_solver(options: Any, solver: GroupOptions) -> Any:
    """Return the options of the pass with another solver."""
    return options.model_copy(update={"solver": solver})


def alone(curves: Mapping[str, SiteCurve]) -> Offers:
    """Return the offers of sites that are all decided one by one."""
    return Offers(list(curves.values()), {}, lambda choices: (dict(choices), []))


def offers(
    program: Program,
    session: Session,
    options: Any,
    index: int,
    selected: Sequence[Selected],
    curves: Mapping[str, SiteCurve],
) -> Offers:
    """Return what the rank policy may choose among: the ranks of every site, and of groups where the solver offers any.

    Where the allocation is learned or looks at single sites, these stand alone.
    """
    solver = None if allocator(options)[1] is not None or options.allocate.measures else modules_of(program, options)
    groups = [] if solver is None else find_groups(program, list(curves), solver)
    if solver is None or not groups:
        return alone(curves)
    grouped = with_solver(options, solver)
    store = GroupStore(program, session, groups, grouped)
    store.solve()
    joint = curves_of(program, session, grouped, store)
    factor = getattr(options.solver, "modules_factor", 1.0)
    mixed = {
        g.name: MixedCurve(tuple(curves[s] for s in g.sites), joint[g.name], biases(program, curves, g.sites), factor)
        for g in groups
    }
    inside = {fqn for g in groups for fqn in g.sites}
    unit = unit_of(options)
    assert unit is not None, "groups are offered under a budget alone"
    rules = {s.fqn: s for s in selected}

    def placed(choices: Mapping[str, Choice]) -> tuple[dict[str, Choice], list[Decision]]:
        found, decisions = dict(choices), []
        for group in groups:
            choice = found.pop(group.name)
            if choice.rank is None or choice.form == APART:
                found |= mixed[group.name].apart(choice, unit, options.round_to)
            else:
                decisions.append(decide(program, store, group, rules, choice, grouped, index))
        return found, decisions

    single = [curve for fqn, curve in curves.items() if fqn not in inside]
    return Offers([*mixed.values(), *single], {g.name: joint[g.name] for g in groups}, placed)


def biases(program: Program, curves: Mapping[str, SiteCurve], fqns: Sequence[str]) -> dict[Any, float]:
    """Return what the curves of sites leave out of their costs: biases, which stay."""
    sites = [program.sites[fqn] for fqn in fqns]
    return {
        "numbers": sum(curves[fqn].fixed("numbers") for fqn in fqns),
        "bytes": sum(site.map.bias_cost(1).bytes for site in sites),
        "flops": sum(curves[fqn].fixed("flops") for fqn in fqns),
    }
