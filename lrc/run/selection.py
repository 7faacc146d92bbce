"""Which sites a pass touches: its patterns against the program's sites, with a reason for every exception."""

from dataclasses import dataclass
from typing import Any

from lrc.errors import UsageError
from lrc.program import Program
from lrc.spec.patterns import Candidate, select


@dataclass(frozen=True)
class Selected:
    """A site that a target pattern matched: the pattern, and why the site is to stay as it is, if it is."""

    fqn: str
    rule: str
    keep: str | None = None


def select_sites(program: Program, options: Any, where: str) -> list[Selected]:
    """Return the sites matched by `options.targets`, in model order; ignored ones come with the reason.

    Raises UsageError when a pattern matches nothing and the pass is not `optional`.
    """
    candidates = [Candidate(site.fqn, site.type_name) for site in program.sites.values()]
    found = select(candidates, options.targets, options.ignore)
    if found.unmatched and not options.optional:
        raise UsageError(
            where,
            message=f"pattern {found.unmatched[0]!r} matches no site",
            hint=f"The model has {len(candidates)} sites ({_some(program)}); `lrc inspect` lists them. "
            "Mend the pattern, or set `optional: true`",
        )
    return [
        Selected(fqn, rule, f"ignored by {found.ignored[fqn]!r}" if fqn in found.ignored else None)
        for fqn, rule in found.rules.items()
    ]


def _some(program: Program) -> str:
    names = list(program.sites)
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
