"""How a function from one site to a map becomes a pass.

Planning selects sites, has the weights decomposed where the pass has a rank, and asks the rank policy; applying calls the
function site by site, in parallel, and puts its map in place. What stays as it is stays with a reason.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lrc.errors import LrcError, SiteError
from lrc.maps import LinearMap
from lrc.program import Program, Site
from lrc.program.absorb import absorb_permutations
from lrc.ranks import Choice
from lrc.run.budget import check_shapes, priced, spent, with_latency
from lrc.run.group_pass import apply_groups, plan_groups
from lrc.run.mixed import modules_of, share_out, with_solver
from lrc.run.passes import PassOptions, ProgramPass, RankedOptions, Rewrite, Statistics
from lrc.run.plan import Decision, Keep
from lrc.run.propagation import in_groups, lockstep
from lrc.run.selection import Selected, select_sites
from lrc.run.session import Session, settled
from lrc.run.statistics import Terms, solve_all
from lrc.run.summary import sketch, summarize
from lrc.solvers import GroupOptions
from lrc.spec.registry import PASSES, Rule

Made = LinearMap | Rewrite | Keep
SiteFunction = Callable[..., Made]
FORMS = {"Chain": "two_factor", "Pivoted": "pivoted"}


def site_pass(options: type[PassOptions]) -> Callable[[SiteFunction], Rule[[], ProgramPass]]:
    """Make a pass of a function `(site, statistics, options)`, or `(site, statistics, rank, options)` if it has a rank.

    The pass has a rank when its options model is a `RankedOptions`. The function returns a map, `Rewrite(map, notes)`, or
    `Keep(reason)`; it edits no graph. Registers nothing.
    """

    def decorate(function: SiteFunction) -> Rule[[], ProgramPass]:
        made: ProgramPass = RankedSitePass(function) if issubclass(options, RankedOptions) else SitePass(function)
        return Rule(PASSES.rule(options)(function).name, options, lambda: made)

    return decorate


class SitePass:
    """A pass made of a function from one site to a map, without a rank."""

    def __init__(self, function: SiteFunction) -> None:
        self.function = function

    def plan(self, program: Program, session: Session, options: Any, index: int) -> Sequence[Decision]:
        """Decide for every selected site, by making its map and looking at it."""
        selected = select_sites(program, session, options, index)
        moments = session.moments(program, [s.fqn for s in selected if not s.keep], options.needs)
        decisions = []
        for choice in session.track(f"plan {options.type}", selected):
            site = program.sites[choice.fqn]
            made = Keep(choice.keep) if choice.keep else self.call(site, options, Statistics(moments(choice.fqn)))
            before = summarize(site.map)
            decision = Decision(index, options.type, (site.fqn,), choice.rule, before, before)
            decisions.append(carried_out(decision, made))
        return decisions

    def apply(self, program: Program, session: Session, options: Any, decisions: Sequence[Decision]) -> Sequence[Decision]:
        """Make every map again and put it in place."""
        work = [d for d in decisions if d.keep is None]
        moments = session.moments(program, [d.sites[0] for d in work], options.needs)
        done = {d.name: d for d in decisions}
        for d in session.track(options.type, work):
            made = self.call(program.sites[d.sites[0]], options, Statistics(moments(d.sites[0])))
            done[d.name] = put(program, replace(d, notes=()), made)  # planning made the same map, with the same notes
        program.settle()
        return list(done.values())

    def call(self, site: Site, options: Any, *arguments: Any) -> Made:
        """Call the function; an error that it raises names the site and the pass."""
        try:
            return self.function(site, *arguments, options)
        except LrcError:
            raise
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise SiteError(site.fqn, message=f"pass `{options.type}` failed: {error}") from error


class RankedSitePass(SitePass):
    """A pass made of a function from one site and a rank to a map."""

    def plan(self, program: Program, session: Session, options: Any, index: int) -> Sequence[Decision]:
        """Decompose every selected weight, and let the rank policy choose."""
        options = settled(program, options)
        if isinstance(options.solver, GroupOptions):
            return plan_groups(program, session, options, index)
        selected = select_sites(program, session, options, index)
        free = [s.fqn for s in selected if not s.keep]
        for fqn in free if options.tied == "joint" else ():
            if program.sites[fqn].lookups:
                program.join(fqn)
        check_shapes(program, session, options)
        terms = session.decompose(program, free, options)
        curves = priced(program, session, options, {fqn: terms.curve(program.sites[fqn], options.form) for fqn in free})
        found = share_out(program, session, options, index, selected, curves, terms)
        before = in_groups(program, free) if compressed(options) else {}
        decisions = list(found.decisions)
        for chosen in selected:
            if chosen.fqn not in found.choices and not chosen.keep:
                continue  # it is in the decision of a group
            made = self.undecided(program.sites[chosen.fqn], chosen, options, index)
            if not chosen.keep:
                made = replace(made, after_sites=before.get(chosen.fqn, ()))
                made = self.decide(made, program.sites[chosen.fqn], found.choices[chosen.fqn], terms)
            decisions.append(made)
        places = {chosen.fqn: place for place, chosen in enumerate(selected)}
        decisions.sort(key=lambda d: places[d.sites[0]])
        session.notices += [*found.notes, *spent(options, {**curves, **found.curves}, decisions)]
        return [with_latency(options, curves, d) for d in decisions]

    def undecided(self, site: Site, chosen: Selected, options: Any, index: int) -> Decision:
        """Return a decision that changes nothing, with the reason why the site is out of the question, if it is."""
        before = summarize(site.map)
        notes = () if options.form in ("auto", *site.layout.forms) else (f"no {options.form} form of a {site.kind}",)
        return Decision(
            index, options.type, (site.fqn,), chosen.rule, before, before,
            full_rank=min(site.shape), keep=chosen.keep, notes=notes,
        )  # fmt: skip

    def decide(self, decision: Decision, site: Site, choice: Choice, terms: Terms) -> Decision:
        """Put what was chosen for one site into its decision."""
        found = terms.spectrum(site.fqn)
        notes = decision.notes + found.notes
        if choice.rank is None:
            return replace(decision, keep=choice.reason, notes=notes)
        form = choice.form
        bias = site.bias is not None or found.mean is not None
        after, before = sketch(site, choice.rank, form, bias=bias), decision.before
        if after.bytes >= before.bytes:
            reason = f"rank {choice.rank} needs {after.bytes} bytes, what stands there {before.bytes} ({before.text})"
            return replace(decision, keep=reason, notes=notes)
        loss = float(found.losses()[choice.rank])
        return replace(
            decision, after=after, rank=choice.rank, form=form, predicted=loss, unit=found.unit, notes=notes
        )  # fmt: skip

    def apply(self, program: Program, session: Session, options: Any, decisions: Sequence[Decision]) -> Sequence[Decision]:
        """Make the maps from the stored decompositions, or one group after the other behind the compressed ones."""
        options = settled(program, options)
        if isinstance(options.solver, GroupOptions):
            return apply_groups(program, session, options, decisions)
        modules = modules_of(program, options)
        groups = [d for d in decisions if len(d.sites) > 1] if modules else []
        joint = apply_groups(program, session, with_solver(options, modules), groups) if modules and groups else []
        alone = self.apply_alone(program, session, options, [d for d in decisions if d not in groups])
        made = {d.name: d for d in [*joint, *alone]}
        return [made[d.name] for d in decisions]

    def apply_alone(
        self, program: Program, session: Session, options: Any, decisions: Sequence[Decision]
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
                made = self.call(site, in_form(options, d), Statistics(seen, terms), rank)
                done[d.name] = put(program, d, made)
        else:
            by_name = {d.sites[0]: d for d in work}
            stored = session.decompose(program, list(by_name), options)

            def make(fqn: str) -> tuple[str, Made]:
                statistics = Statistics(terms=stored.full(fqn))
                d = by_name[fqn]
                return fqn, self.call(program.sites[fqn], in_form(options, d), statistics, d.rank)

            solved = session.track(options.type, solve_all(list(by_name), make, session.workers), len(by_name))
            made_by_name = dict(solved)
            for fqn, d in by_name.items():
                done[d.name] = put(program, d, made_by_name[fqn])
        program.settle()
        return [with_note(program, d, note) for d, note in absorbed(program, done.values())]


def compressed(options: Any) -> bool:
    """Say whether later sites are solved behind the already compressed earlier ones."""
    return getattr(options.solver, "propagate", "dense") == "compressed"


def in_form(options: Any, decision: Decision) -> Any:
    """Return the options with two factors as the form where that was decided: the smaller form may be the slower one."""
    return options.model_copy(update={"form": "two_factor"}) if decision.form == "two_factor" else options


def put(program: Program, decision: Decision, made: Made) -> Decision:
    """Put a made map in place; return the decision as it was carried out. The graph is settled by the caller."""
    if not isinstance(made, Keep):
        new = made.map if isinstance(made, Rewrite) else made
        program.replace(decision.sites[0], new, decision.type, settle=False)
    return carried_out(decision, made)


def carried_out(decision: Decision, made: Made) -> Decision:
    """Return a decision with what was really made."""
    if isinstance(made, Keep):
        return replace(decision, keep=made.reason, after=decision.before, rank=None, form=None, predicted=None, unit=None)
    new, notes = (made.map, made.notes) if isinstance(made, Rewrite) else (made, ())
    after = summarize(new)
    form = None if decision.form is None else FORMS.get(after.text.split("[", 1)[0], decision.form)
    if isinstance(made, Rewrite) and made.rank not in (None, decision.rank):
        decision = replace(decision, rank=made.rank, predicted=None, unit=None)
    return replace(decision, after=after, form=form, notes=decision.notes + tuple(notes))


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
