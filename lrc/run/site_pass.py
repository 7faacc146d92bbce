"""How a function from one site to a map becomes a pass.

Planning selects sites, has the weights decomposed where the pass has a rank, and asks the rank policy; applying calls the
function site by site and puts its map in place. What stays as it is stays with a reason.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lrc.errors import SiteError
from lrc.maps import LinearMap
from lrc.program import Program, Site
from lrc.ranks import Choice, choose
from lrc.run.passes import PassOptions, ProgramPass, RankedOptions, Statistics
from lrc.run.plan import Decision, Keep
from lrc.run.propagation import in_groups, lockstep
from lrc.run.selection import Selected, select_sites
from lrc.run.session import Session
from lrc.run.summary import sketch, summarize
from lrc.solvers import Decomposition, Moments
from lrc.spec.registry import PASSES, Rule

SiteFunction = Callable[..., LinearMap | Keep]


def site_pass(options: type[PassOptions]) -> Callable[[SiteFunction], Rule[[], ProgramPass]]:
    """Make a pass of a function `(site, statistics, options)`, or `(site, statistics, rank, options)` if it has a rank.

    The pass has a rank when its options model is a `RankedOptions`. The function returns a map, or `Keep(reason)`; it
    edits no graph. Registers nothing.
    """

    def decorate(function: SiteFunction) -> Rule[[], ProgramPass]:
        made = RankedSitePass(function) if issubclass(options, RankedOptions) else SitePass(function)
        return Rule(PASSES.rule(options)(function).name, options, lambda: made)

    return decorate


class SitePass:
    """A pass made of a function from one site to a map, without a rank."""

    def __init__(self, function: SiteFunction) -> None:
        self.function = function

    def plan(self, program: Program, session: Session, options: Any, index: int) -> Sequence[Decision]:
        """Decide for every selected site, by making its map and looking at it."""
        selected = select_sites(program, options, session.where(index))
        moments = session.moments(program, options.needs)
        decisions = []
        for choice in session.track(f"plan {options.type}", selected):
            site = program.sites[choice.fqn]
            made = Keep(choice.keep) if choice.keep else self.call(site, options, Statistics(moments(choice.fqn)))
            before = summarize(site.map)
            kept = made.reason if isinstance(made, Keep) else None
            after = before if isinstance(made, Keep) else summarize(made)
            decisions.append(Decision(index, options.type, (site.fqn,), choice.rule, before, after, keep=kept))
        return decisions

    def apply(
        self, program: Program, session: Session, options: Any, decisions: Sequence[Decision]
    ) -> Sequence[Decision]:
        """Make every map again and put it in place."""
        moments = session.moments(program, options.needs)
        made = {
            d.name: self.call(program.sites[d.sites[0]], options, Statistics(moments(d.sites[0])))
            for d in session.track(options.type, decisions)
            if d.keep is None
        }
        return [put(program, d, made[d.name]) if d.name in made else d for d in decisions]

    def call(self, site: Site, options: Any, *arguments: Any) -> LinearMap | Keep:
        """Call the function; an error that it raises names the site and the pass."""
        try:
            return self.function(site, *arguments, options)
        except (RuntimeError, ValueError, IndexError) as error:
            raise SiteError(site.fqn, message=f"pass `{options.type}` failed: {error}") from error


class RankedSitePass(SitePass):
    """A pass made of a function from one site and a rank to a map."""

    def plan(self, program: Program, session: Session, options: Any, index: int) -> Sequence[Decision]:
        """Decompose every selected weight, and let the rank policy choose."""
        selected = select_sites(program, options, session.where(index))
        free = [s.fqn for s in selected if not s.keep]
        terms = session.decompose(program, free, options)
        curves = [terms.curve(program.sites[fqn], options.form) for fqn in free]
        choices = choose(curves, options.rank, allocate=options.allocate, round_to=options.round_to)
        before = in_groups(program, free) if compressed(options) else {}
        return [
            self.decide(program.sites[s.fqn], s, options, index, choices, terms.spectrum, before.get(s.fqn, ()))
            for s in selected
        ]

    def decide(
        self,
        site: Site,
        selected: Selected,
        options: Any,
        index: int,
        choices: dict[str, Choice],
        spectrum: Callable[[str], Decomposition],
        after_sites: tuple[str, ...],
    ) -> Decision:
        """Put what was chosen for one site into a decision."""
        before = summarize(site.map)
        common = (index, options.type, (site.fqn,), selected.rule, before)
        if selected.keep:
            return Decision(*common, before, keep=selected.keep)
        terms, choice = spectrum(site.fqn), choices[site.fqn]
        if choice.rank is None:
            return Decision(*common, before, keep=choice.reason, notes=terms.notes)
        form = options.form if options.form != "auto" else "pivoted"
        after = sketch(site, choice.rank, form, bias=site.bias is not None or terms.mean is not None)
        loss = float(terms.losses()[choice.rank])
        return Decision(
            *common, after, choice.rank, form, loss, terms.unit, after_sites=after_sites, notes=terms.notes
        )

    def apply(
        self, program: Program, session: Session, options: Any, decisions: Sequence[Decision]
    ) -> Sequence[Decision]:
        """Make the maps from the stored decompositions, or one group after the other behind the compressed ones."""
        done = {d.name: d for d in decisions}
        work = [d for d in decisions if d.keep is None]
        if compressed(options):
            moments = lockstep(program, session, options)
        else:
            moments = session.moments(program, options.solver.needs, options.solver)
        for d in session.track(options.type, work):
            site, rank = program.sites[d.sites[0]], d.rank
            assert rank is not None, "a ranked decision that is not kept has a rank"
            seen: Moments = moments(site.fqn)
            statistics = Statistics(seen, session.terms(program, site, options, rank, seen))
            done[d.name] = put(program, d, self.call(site, options, statistics, rank))
        return list(done.values())


def compressed(options: Any) -> bool:
    """Say whether later sites are solved behind the already compressed earlier ones."""
    return getattr(options.solver, "propagate", "dense") == "compressed"


def put(program: Program, decision: Decision, made: LinearMap | Keep) -> Decision:
    """Put a made map in place; return the decision as it was carried out."""
    if isinstance(made, Keep):
        return replace(decision, keep=made.reason, after=decision.before, rank=None, form=None, predicted=None, unit=None)
    program.replace(decision.sites[0], made)
    after = summarize(made)
    form = decision.form if decision.form is None else after.text.split("[", 1)[0]
    return replace(decision, after=after, form={"Chain": "two_factor", "Pivoted": "pivoted"}.get(form or "", decision.form))
