"""merge: constant folding on maps.

    Chain(Chain(C, B), A)         ->  Chain(C, B, A), neighbours multiplied out where that is cheaper
    Sum(Chain(B, A), Chain(D, C)) ->  Chain([B D], [A; C])
    Scale(Dense, s)               ->  Dense, and so on for Diagonal and identity permutations
    anything, with `dense: true`  ->  Dense(X.dense())

Running it twice changes nothing the second time.
"""

from typing import Literal

from pydantic import Field

from lrc.maps import fold, simplify
from lrc.program import Site
from lrc.run import Keep, PassOptions, Rewrite, Statistics, site_pass


class Merge(PassOptions):
    """Fold maps together where that makes them no larger and no slower."""

    type: Literal["merge"] = "merge"
    dense: bool = Field(default=False, description="Fold every map to one dense weight, even where that is larger.")


@site_pass(Merge)
def merge(site: Site, statistics: Statistics, options: Merge) -> Rewrite | Keep:
    """X -> the cheapest equal map that the rules of `lrc.maps.simplify` reach, or Dense(X.dense())."""
    before = site.map
    if not options.dense:
        made, notes = simplify(before)
        if notes:
            return Rewrite(made, notes)
        return Keep(f"nothing to fold{'' if before.obstacle() is None else f': {before.obstacle()}'}")
    made = fold(before)
    if made is before:
        return Keep("nothing to fold: the map is one dense weight")
    sizes = f"{before.cost().parameters} -> {made.cost().parameters}"
    return Rewrite(made, (f"folded to one dense weight, {sizes} numbers",))
