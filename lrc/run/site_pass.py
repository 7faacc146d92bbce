"""How a function from one site to a map becomes a pass.

Planning selects sites and makes their maps to look at them; applying makes them again and puts them in place. What stays as
it is stays with a reason. Where maps have a rank, see `lrc.run.ranked_pass`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lrc.errors import LrcError, SiteError
from lrc.maps import LinearMap
from lrc.program import Program, Site
from lrc.run.passes import Rewrite, Statistics, needs_of
from lrc.run.plan import Decision, Keep
from lrc.run.selection import select_sites
from lrc.run.session import Session
from lrc.run.summary import summarize

Made = LinearMap | Rewrite | Keep
SiteFunction = Callable[..., Made]
FORMS = {"Chain": "two_factor", "Pivoted": "pivoted"}


class SitePass:
    """A pass made of a function from one site to a map, without a rank."""

    def __init__(self, function: SiteFunction) -> None:
        self.function = function

    def plan(self, program: Program, session: Session, options: Any, index: int) -> Sequence[Decision]:
        """Decide for every selected site, by making its map and looking at it."""
        selected = select_sites(program, session, options, index)
        moments = session.moments(program, [s.fqn for s in selected if not s.keep], needs_of(options))
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
        moments = session.moments(program, [d.sites[0] for d in work], needs_of(options))
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
