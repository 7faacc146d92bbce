"""How a function from one site and a rank to a map becomes a pass.

Planning has the weights decomposed and asks the rank policy; applying calls the function site by site, in parallel, on the
stored decompositions, or one group after the other behind the compressed ones.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lrc.forms import forms_of, kernel_form
from lrc.maps.fused_recurrence import SMALL
from lrc.program import Program, Site
from lrc.program.absorb import absorb_permutations
from lrc.program.modules import fused_linears
from lrc.ranks import Allocation, Choice, GroupCurve, SiteCurve, allocate_ranks
from lrc.run.budget import check_budget, check_shapes, priced, rest_of, spent, with_latency
from lrc.run.coded_pass import coded_pass
from lrc.run.evidence import check_evidence, with_evidence
from lrc.run.group_pass import apply_groups, plan_groups
from lrc.run.learning import allocator, learning
from lrc.run.mixed import alone, modules_of, offers, with_solver
from lrc.run.passes import Statistics
from lrc.run.plan import Decision
from lrc.run.points import drawer
from lrc.run.propagation import in_groups, lockstep
from lrc.run.quality import judge_of, points_of, trials_for
from lrc.run.selection import Selected, select_sites
from lrc.run.session import Session, alignment, settled
from lrc.run.site_pass import Made, SitePass, put
from lrc.run.statistics import Terms, solve_all
from lrc.run.summary import sketch, summarize
from lrc.run.sweep import check_sweep, swept
from lrc.solvers import CodedOptions, GroupOptions, Need

SHARED_RANK = (
    "one factorisation for queries, keys and values, in which those of the largest numbers count most: the solver `kfac` "
    "weighs them by the loss, `modular` takes features of each"
)
MULTIPLIED_OUT = (
    "multiplied out where it runs by torch's or ONNX Runtime's own operator: smaller, and about as fast as the dense layer"
)
LOOPED = "runs as a loop over time, each step in factors: that need not be faster than torch's own operator"


class RankedSitePass(SitePass):
    """A pass made of a function from one site and a rank to a map."""

    def plan(self, program: Program, session: Session, options: Any, index: int) -> Sequence[Decision]:
        """Decompose every selected weight, and let the rank policy choose."""
        note_alignment(program, session, options)
        options = settled(program, options)
        if isinstance(options.solver, GroupOptions):
            return plan_groups(program, session, options, index)
        if isinstance(options.solver, CodedOptions):
            return coded_pass.plan(program, session, options, index)
        selected = select_sites(program, session, options, index)
        free = [s.fqn for s in selected if not s.keep]
        for fqn in free if options.tied == "joint" else ():
            if program.sites[fqn].lookups:
                program.join(fqn)
        check_shapes(program, session, options)
        check_budget(program, session, options, free)
        check_sweep(program, session, options.rank)
        check_evidence(program, session, options, index)
        trials = trials_for(program, session, options, index)
        terms = session.decompose(program, free, options)
        curves = priced(program, session, options, {fqn: terms.curve(program.sites[fqn], options.form) for fqn in free})
        before = in_groups(program, free) if compressed(options) else {}
        shared_rank = fused_linears(program, free) if Need.GRADIENTS not in options.solver.needs else set()
        places = {chosen.fqn: place for place, chosen in enumerate(selected)}
        offered = alone(curves)

        def decided(choices: Mapping[str, Choice]) -> list[Decision]:
            of_sites, decisions = offered.placed(choices)
            for chosen in selected:
                if not chosen.keep and chosen.fqn not in of_sites:
                    continue  # it is in the decision of a group, or nothing is asked about it
                made = self.undecided(program.sites[chosen.fqn], chosen, options, index)
                if not chosen.keep:
                    made = replace(made, after_sites=before.get(chosen.fqn, ()))
                    if kernel_form(options.form) and not curves[chosen.fqn].only and not made.notes:
                        made = replace(made, notes=(no_front(options),))
                    made = self.decide(made, program.sites[chosen.fqn], of_sites[chosen.fqn], curves[chosen.fqn], terms)
                    if chosen.fqn in shared_rank and made.keep is None:
                        made = replace(made, notes=(*made.notes, SHARED_RANK))
                    if program.sites[chosen.fqn].looped and made.keep is None:
                        small = math.prod(program.sites[chosen.fqn].shape) <= SMALL
                        made = replace(made, notes=(*made.notes, MULTIPLIED_OUT if small else LOOPED))
                decisions.append(with_latency(options, curves, made))
            return sorted(decisions, key=lambda d: places[d.sites[0]])

        def tried(choices: Mapping[str, Choice]) -> Program:
            clone = program.clone()
            self.carry_out(clone, session, options, decided(choices), terms)
            return clone

        curves = with_evidence(program, session, options, curves, terms, tried, index)
        offered = offers(program, session, options, index, selected, curves)
        shared, how = allocator(options)

        def allocated(policy: Any) -> Allocation:
            return allocate_ranks(
                offered.curves,
                policy,
                allocate=shared,
                round_to=options.round_to,
                rest=rest_of(program, curves),
                judge=None if trials is None else judge_of(options.rank.quality, trials, session, tried),
                search=learning(program, session, options, terms, how),
            )

        found = allocated(options.rank)
        decisions = decided(found.choices)
        known: dict[str, SiteCurve | GroupCurve] = {**curves, **offered.joint}
        session.notices += [*found.notes, *spent(options, known, decisions)]
        if found.tried or session.pareto is not None:
            draw = drawer(program, session, options, curves, index)
            session.points += points_of(found, decided, draw)
            session.points += swept(program, session, options.rank, options.type, allocated, decided, tried, draw)
        return decisions

    def undecided(self, site: Site, chosen: Selected, options: Any, index: int) -> Decision:
        """Return a decision that changes nothing, with the reason why the site is out of the question, if it is."""
        before = summarize(site.map)
        notes = () if options.form in ("auto", *forms_of(site.layout)) else (f"no {options.form} form of a {site.kind}",)
        return Decision(
            index, options.type, (site.fqn,), chosen.rule, before, before,
            full_rank=site.full_rank, keep=chosen.keep, notes=notes,
        )  # fmt: skip

    def decide(self, decision: Decision, site: Site, choice: Choice, curve: SiteCurve, terms: Terms) -> Decision:
        """Put what was chosen for one site into its decision."""
        found = terms.spectrum(site.fqn)
        notes = decision.notes + found.notes
        if choice.rank is None:
            return replace(decision, keep=choice.reason, notes=notes)
        form = choice.form
        bias = site.bias is not None or found.mean is not None
        after, before = sketch(site, choice.rank, form, bias=bias, ranks=choice.ranks), decision.before
        if after.bytes >= before.bytes:
            reason = f"rank {choice.rank} needs {after.bytes} bytes, what stands there {before.bytes} ({before.text})"
            return replace(decision, keep=reason, notes=notes)
        return replace(
            decision, after=after, rank=choice.rank, ranks=choice.ranks if len(choice.ranks) > 1 else (), form=form,
            predicted=loss_of(curve, choice), unit=found.unit, notes=notes,
        )  # fmt: skip

    def apply(self, program: Program, session: Session, options: Any, decisions: Sequence[Decision]) -> Sequence[Decision]:
        """Make the maps from the stored decompositions, or one group after the other behind the compressed ones."""
        return self.carry_out(program, session, settled(program, options), decisions, None)

    def carry_out(
        self, program: Program, session: Session, options: Any, decisions: Sequence[Decision], stored: Terms | None
    ) -> Sequence[Decision]:
        """Apply, with the stored decompositions where they are at hand."""
        if isinstance(options.solver, GroupOptions):
            return apply_groups(program, session, options, decisions)
        if isinstance(options.solver, CodedOptions):
            return coded_pass.apply(program, session, options, decisions)
        modules = modules_of(program, options)
        groups = [d for d in decisions if len(d.sites) > 1] if modules else []
        single = [d for d in decisions if d not in groups]
        if groups and stored is None and not compressed(options):  # as planned: of the weights and statistics before the groups
            stored = session.decompose(program, [d.sites[0] for d in single if d.keep is None], options)
        joint = apply_groups(program, session, with_solver(options, modules), groups) if modules and groups else []
        single = list(self.apply_alone(program, session, options, single, stored))
        made = {d.name: d for d in [*joint, *single]}
        return [made[d.name] for d in decisions]

    def apply_alone(
        self, program: Program, session: Session, options: Any, decisions: Sequence[Decision], stored: Terms | None
    ) -> Sequence[Decision]:
        """Make the maps of sites that are decided one by one."""
        work = [d for d in decisions if d.keep is None]
        done = {d.name: d for d in decisions}
        if compressed(options):
            moments = lockstep(program, session, options, [d.sites[0] for d in work])
            for d in session.track(options.type, sorted(work, key=lambda d: program.position(d.sites[0]))):
                site, rank = program.sites[d.sites[0]], d.rank
                assert rank is not None, "a ranked decision that is not kept has a rank"
                seen = moments(site.fqn)
                terms = session.solve(site, seen, options, rank)
                made = self.call(site, in_form(options, d), Statistics(seen, terms, d.ranks), rank)
                done[d.name] = put(program, d, made)
        else:
            by_name = {d.sites[0]: d for d in work}
            found = stored or session.decompose(program, list(by_name), options)
            moments = session.moments(program, list(by_name), options.solver.needs, options.solver)
            if any(kernel_form(d.form or "") for d in work):
                moments(work[0].sites[0])  # in this thread, for all of them

            def make(fqn: str) -> tuple[str, Made]:
                d = by_name[fqn]
                whole = found.full(fqn)
                if kernel_form(d.form or ""):  # made of the norm, which is not stored
                    whole = session.solve(program.sites[fqn], moments(fqn), options)
                statistics = Statistics(terms=whole, ranks=d.ranks)
                return fqn, self.call(program.sites[fqn], in_form(options, d), statistics, d.rank)

            solved = session.track(options.type, solve_all(list(by_name), make, session.workers), len(by_name))
            made_by_name = dict(solved)
            for fqn, d in by_name.items():
                done[d.name] = put(program, d, made_by_name[fqn])
        program.settle()
        return [with_note(program, d, note) for d, note in absorbed(program, done.values())]


def note_alignment(program: Program, session: Session, options: Any) -> None:
    """Say in the plan what `round_to: auto` is."""
    step, reason = alignment(program, options)
    note = f"ranks are multiples of {step} (`round_to: auto`): {reason}"
    if reason and note not in session.notices:
        session.notices.append(note)


def compressed(options: Any) -> bool:
    """Say whether later sites are solved behind the already compressed earlier ones."""
    return getattr(options.solver, "propagate", "dense") == "compressed"


def in_form(options: Any, decision: Decision) -> Any:
    """Return the options with the form that was decided; a pivoted one may turn out as two factors."""
    return options.model_copy(update={"form": decision.form}) if decision.form not in (None, "pivoted") else options


def no_front(options: Any) -> str:
    """Return the note on a site that gets two factors where another form was asked for."""
    return f"no smaller {options.form} form, or none by the solver {options.solver.type}: two factors"


def loss_of(curve: SiteCurve, choice: Choice) -> float:
    """Return the predicted loss of a chosen product."""
    assert choice.rank is not None, "a chosen product has a rank"
    for front in curve.fronts:
        if front.form == choice.form:
            return float(front.losses[front.place(choice.ranks)])
    return float(curve.losses[choice.rank])


def absorbed(program: Program, decisions: Any) -> list[tuple[Decision, str | None]]:
    """Let neighbours absorb the order of pivoted outputs; return every decision with what was done for it."""
    notes = absorb_permutations(program)
    return [(d, notes.get(d.sites[0])) for d in decisions]


def with_note(program: Program, decision: Decision, note: str | None) -> Decision:
    """Return a decision with the map that stands there at the end."""
    if decision.keep is not None:
        return decision
    notes = decision.notes if note is None else (*decision.notes, note)
    return replace(decision, after=summarize(program.map_of(decision.sites[0])), notes=notes)
