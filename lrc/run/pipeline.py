"""From a program and the passes of a spec to a plan, and to the rewritten program."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lrc.maps import Rows
from lrc.program import Program, Site
from lrc.program.find import consumers, find_products
from lrc.program.loops import put_back, write_out
from lrc.program.stored import named_tensors
from lrc.run.mixed import modules_of
from lrc.run.passes import RankedOptions, needs_of, pass_for
from lrc.run.plan import Decision, Plan
from lrc.run.points import difference
from lrc.run.session import Session
from lrc.run.site_pass import SitePass
from lrc.solvers import Grouping, Need

SHOWN = 3  # tensors that a note names


def make_plan(program: Program, passes: Sequence[Any], session: Session) -> Plan:
    """Say what the passes would do. `program` is not changed; a pass sees what the passes before it would leave."""
    twin = program.clone()
    write_out(twin)
    session.original = program
    before = program.size()
    decisions: list[Decision] = []
    saved = (0, 0)
    steps = [(index, step) for index, options in enumerate(passes) for step in (options, *options.within())]
    for index, options in steps:
        made = pass_for(options)
        decided = list(made.plan(twin, session, options, index))
        last = options is steps[-1][1]
        if not options.structural:
            if not last:
                session.notices.append(f"passes after `{options.type}` are planned on the values before it")
        elif last and isinstance(made, SitePass):
            saved = difference(twin, decided)  # of a pass that edits the graph, only doing so tells
        else:
            decided = list(made.apply(twin, session, options, decided))
        decisions += decided
    numbers, size = twin.size()
    plan = Plan(tuple(decisions), (before[0], numbers + saved[0]), (before[1], size + saved[1]))
    return finished(plan, program, passes, session)


def run_passes(program: Program, passes: Sequence[Any], session: Session, original: Program | None = None) -> Plan:
    """Rewrite `program` as the passes decide; return the plan as it was carried out. original: a copy from before."""
    session.original = original or program.clone()
    write_out(program)
    before = program.size()
    decisions: list[Decision] = []
    for index, options in enumerate(passes):
        made = pass_for(options)
        decide = getattr(made, "plan_bare", made.plan)
        decided = decide(program, session, options, index)
        decisions += made.apply(program, session, options, decided)
    put_back(program)
    after = program.size()
    return finished(Plan(tuple(decisions), (before[0], after[0]), (before[1], after[1])), program, passes, session)


def finished(plan: Plan, program: Program, passes: Sequence[Any], session: Session) -> Plan:
    """Return a plan with the predicted memory and what was noticed on the way."""
    return replace(
        plan,
        peak_memory=predicted_memory(session.original or program, passes, plan, session),
        shadowed=tuple(session.shadowed),
        notes=(*session.notices, *left_dense(program, passes)),
        points=tuple(session.points),
    )


def left_dense(program: Program, passes: Sequence[Any]) -> list[str]:
    """Return a line on stored tensors of three and more dimensions that are no sites: experts, transposed convolutions."""
    if not any(isinstance(options, RankedOptions) for options in passes):
        return []
    graph, tensors = program.graph_module.graph, dict(named_tensors(program.graph_module, remove_duplicate=False))
    readers = consumers(graph, find_products(graph, tensors), tensors, program.recurrent)
    found = {name: ops for name, ops in readers.items() if tensors[name].ndim > 2 and tensors[name].is_floating_point()}
    if not found:
        return []
    first = [f"{name} {tuple(tensors[name].shape)}, read by {found[name][0]}" for name in list(found)[:SHOWN]]
    more = f", and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    numbers = sum(tensors[name].numel() for name in found)
    return [f"no sites, so they stay dense ({numbers} of {program.size()[0]} parameters): {'; '.join(first)}{more}"]


def predicted_memory(program: Program, passes: Sequence[Any], plan: Plan, session: Session) -> int:
    """Return the predicted peak of memory in bytes, beside the interpreter and its libraries.

    The weights once, as they were (the rewritten ones take the place of the old), the float64 moments of all sites of the
    pass that needs most (inputs that sites share once), and for every worker what the largest decomposition works with; or
    what a training step takes, where that is more.
    """
    most = 0
    for index, options in enumerate(passes):
        decided = [[program.sites[fqn] for fqn in d.sites if fqn in program.sites] for d in plan.of_pass(index)]
        sites = [site for group in decided for site in group]
        needs = needs_of(options)
        grams = {site.uses[0].reads: gram_numbers(site) for site in sites} if Need.INPUTS in needs else {}
        fishers = sum(site.out_features**2 for site in sites) if Need.GRADIENTS in needs else 0
        fishers += sum(site.out_features * site.in_features for site in sites) if Need.WEIGHT_FISHER in needs else 0
        work = work_numbers(program, options, decided)
        most = max(most, 8 * (sum(grams.values()) + fishers + session.workers * work))
    return max(plan.bytes[0] + most, *session.step_memory.values(), 0)


def work_numbers(program: Program, options: Any, decided: Sequence[Sequence[Site]]) -> int:
    """Return how many float64 numbers the largest decomposition of a pass works with, of one site or of a group of them.

    Eight matrices of the weight's size, or ten of all weights that share a basis, five of the second moment of what it reads
    and two of that of the gradients, where these are asked for. A module has eight of the second moment that its last linear
    reads, which an MLP's is far larger than its weights. Seen on the solvers: a half to the whole of that.
    """
    needs, grouping = needs_of(options), getattr(getattr(options, "solver", None), "grouping", None)
    most = 0
    for group in decided:
        sizes = [site.out_features * site.in_features for site in group]
        work = 10 * sum(sizes) if grouping is Grouping.ALIKE else 8 * max(sizes, default=0)
        inputs = max((site.in_features**2 for site in group if not site.layout.looked_up), default=0)
        outputs = max((site.out_features**2 for site in group), default=0)
        most = max(most, work + 5 * inputs * (Need.INPUTS in needs) + 2 * outputs * (Need.GRADIENTS in needs))
    linears = [site for group in decided for site in group if isinstance(site.layout, Rows)]
    modules = grouping is Grouping.MODULES or (isinstance(options, RankedOptions) and modules_of(program, options) is not None)
    if not modules or not linears:
        return most
    read = max(site.in_features**2 for site in linears)
    return max(most, 8 * (read + max(site.out_features * site.in_features for site in linears)))


def gram_numbers(site: Site) -> int:
    """Return how many numbers the second moment of a site's inputs has; that of one-hot vectors is diagonal."""
    return site.in_features if site.layout.looked_up else site.layout.groups * site.in_features**2
