"""What a pruning method is, and how one is written.

A method is the two halves of a pass (`@pruner(Options)` on a class with `plan` and `apply`), or a function from one site to
a map (`@site_pruner(Options)`); either is given the options of the pass, whose `method` are its own. Found by entry points
of the group `lrc.pruners`, ours and a stranger's.
"""

from collections.abc import Callable

from lrc.program import Site
from lrc.run.passes import ProgramPass
from lrc.run.site_pass import SiteFunction, SitePass
from lrc.solvers import Need
from lrc.spec.base import Tagged
from lrc.spec.registry import PRUNERS, Rule


class PrunerOptions(Tagged):
    """The options of a pruning method."""

    @property
    def needs(self) -> frozenset[Need]:
        """What must be measured at every site for it."""
        return frozenset()

    def obstacle_at(self, site: Site) -> str | None:
        """Return why the method can do nothing at a site, or None."""
        return None if site.fqn in site.program.maps else site.layout.obstacle()


def pruner(options: type[PrunerOptions]) -> Callable[[type[ProgramPass]], Rule[[], ProgramPass]]:
    """Tie a class with the methods `plan` and `apply` to its options model. Registers nothing."""
    return PRUNERS.rule(options)


def site_pruner(options: type[PrunerOptions]) -> Callable[[SiteFunction], Rule[[], ProgramPass]]:
    """Make a method of a function `(site, statistics, options)` that returns a map, `Rewrite(map, notes)` or `Keep(reason)`."""

    def decorate(function: SiteFunction) -> Rule[[], ProgramPass]:
        made: ProgramPass = SitePass(function)
        return Rule(PRUNERS.rule(options)(function).name, options, lambda: made)

    return decorate


__all__ = ["PrunerOptions", "pruner", "site_pruner"]
