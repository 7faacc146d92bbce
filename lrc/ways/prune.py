"""The largest entries of a weight alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from lrc.maps import LinearMap, Sparse
from lrc.solvers.base import Moments
from lrc.solvers.scores import wanda
from lrc.solvers.splits.support import Pattern, density_of, stored_as, strongest
from lrc.ways.base import Target, Variant, WayOptions, way
from lrc.ways.factorize import Share


class PruneWay(WayOptions):
    """Entries that are left out, by size of weight and input."""

    type: Literal["prune"] = "prune"
    densities: list[Share] = Field(default=[0.1, 0.25, 0.5], description="Shares of the entries that stay, in every row.")
    patterns: list[Pattern] = Field(default=["2:4"], description="Patterns `n:m`, n of every m inputs.")

    def variants(self, out_features: int, in_features: int) -> Sequence["Pruned"]:
        """Return every density and pattern."""
        shares = [Pruned(f"sparse {share:g}", "rows", share) for share in self.densities]
        return shares + [Pruned(f"sparse {pattern}", pattern, density_of(pattern) or 1.0) for pattern in self.patterns]


@dataclass(frozen=True)
class Pruned(Variant):
    """What stays, and where it may stand."""

    pattern: str
    density: float


@way(PruneWay)
def prune(target: Target, variant: Pruned) -> LinearMap:
    """Return the entries of the largest scores by Wanda."""
    scores = wanda(target.weight, Moments(gram=target.gram))
    support = strongest(scores, variant.pattern, variant.density)
    return Sparse.of(target.weight.to(target.dtype), support, pattern=stored_as(variant.pattern))
