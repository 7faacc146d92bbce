"""The decorator that makes a pass of a function from one site to a map."""

from collections.abc import Callable

from lrc.run.passes import PassOptions, ProgramPass, RankedOptions
from lrc.run.ranked_pass import RankedSitePass
from lrc.run.site_pass import SiteFunction, SitePass
from lrc.spec.registry import PASSES, Rule


def site_pass(options: type[PassOptions]) -> Callable[[SiteFunction], Rule[[], ProgramPass]]:
    """Make a pass of a function `(site, statistics, options)`, or `(site, statistics, rank, options)` if it has a rank.

    The pass has a rank when its options model is a `RankedOptions`. The function returns a map, `Rewrite(map, notes)`, or
    `Keep(reason)`; it edits no graph. Registers nothing.
    """

    def decorate(function: SiteFunction) -> Rule[[], ProgramPass]:
        made: ProgramPass = RankedSitePass(function) if issubclass(options, RankedOptions) else SitePass(function)
        return Rule(PASSES.rule(options)(function).name, options, lambda: made)

    return decorate
