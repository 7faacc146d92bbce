"""Which sites a pass touches: its patterns against the program's sites, with a reason for every exception."""

from dataclasses import dataclass
from typing import Any

from lrc.errors import SiteError, UsageError
from lrc.program import Program
from lrc.program.routing import routes
from lrc.run.session import Session
from lrc.run.summary import stays
from lrc.spec.patterns import Candidate, select

EVERYTHING = "**"  # the bare pattern leaves embeddings: nobody wants them changed without having named them


@dataclass(frozen=True)
class Selected:
    """A site that a target pattern matched: the pattern, and why the site is to stay as it is, if it is."""

    fqn: str
    rule: str
    keep: str | None = None


def select_sites(program: Program, session: Session, options: Any, index: int) -> list[Selected]:
    """Return the sites matched by `options.targets`, in model order; those that must stay come with the reason.

    Patterns that later ones overrule everywhere are noted in the session. Raises UsageError when a pattern matches nothing
    and the pass is not `optional`.
    """
    candidates = [Candidate(site.fqn, site.type_name) for site in program.sites.values()]
    found = select(candidates, options.targets, options.ignore)
    rules = {fqn: rule for fqn, rule in found.rules.items() if rule != EVERYTHING or not program.sites[fqn].layout.looked_up}
    if found.unmatched and not options.optional:
        raise UsageError(
            session.where(index),
            message=f"pattern {found.unmatched[0]!r} matches no site",
            hint=f"The model has {len(candidates)} sites ({_some(program)}); `lrc inspect` lists them. "
            f"{_elsewhere(program)}Mend the pattern, or set `optional: true`",
        )
    session.shadowed += [pattern for pattern in found.shadowed if pattern not in session.shadowed]
    return [
        Selected(fqn, rule, f"ignored by {found.ignored[fqn]!r}" if fqn in found.ignored else _kept(program, fqn, options))
        for fqn, rule in rules.items()
    ]


def _kept(program: Program, fqn: str, options: Any) -> str | None:
    """Return the reason why a site is out of the question for a pass, or None."""
    site = program.sites[fqn]
    router = "it chooses the experts of every row" if options.structural and routes(site) else None
    return options.obstacle_at(site) or router or _tied(program, fqn, options)


def _tied(program: Program, fqn: str, options: Any) -> str | None:
    """Return the reason to keep a site whose weight something else reads, as the pass's `tied` option says."""
    readers = ", ".join(program.sites[fqn].tied)
    policy = getattr(options, "tied", "untie")
    if policy == "untie" or not stays(program.sites[fqn]):
        return None
    if policy == "error":
        raise SiteError(
            fqn,
            message=f"the weight is tied: {readers} reads it too",
            hint="Set `tied: keep`, `untie` or `joint`, or ignore the site",
        )
    if policy == "joint":
        alone = f"tied: {readers} reads the same weight in a way that no product can be shared with"
        return None if program.sites[fqn].lookups else alone
    return f"tied: {readers} reads the same weight (`tied: untie` gives the linear its own)"


def _some(program: Program) -> str:
    names = list(program.sites)
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _elsewhere(program: Program) -> str:
    """Return which operations use weights that are no sites, so that a pattern for them is understood."""
    others = program.unsupported()
    return f"Weights read by {', '.join(others)} are no sites. " if others else ""
