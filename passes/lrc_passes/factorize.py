"""factorize: a dense weight becomes a product of rank r.

    W                 ->  Chain(B, A)        r(m+n) numbers; or
    W                 ->  Pivoted(P, Z)      the same product in r(m+n-r) numbers and an index of m

    %y = linear(%x, fc.weight: f32[m, n], fc.bias)
    %h = linear(%x, fc.A: f32[r, n]);  %y = linear(%h, fc.B: f32[m, r], fc.bias)
"""

from typing import Annotated, Literal

from pydantic import Field

from lrc.maps import LinearMap, low_rank
from lrc.program import Site
from lrc.run import Keep, RankedOptions, Statistics, site_pass
from lrc.solvers import KfacSolver, PivotRefused, SolverOptions, pivot
from lrc.spec.registry import SOLVERS, Registered


class Factorize(RankedOptions):
    """Replace dense weights by low-rank products."""

    type: Literal["factorize"] = "factorize"
    solver: Annotated[SolverOptions, Registered(SOLVERS)] = Field(
        default=KfacSolver(), description="How a weight is decomposed: a name, or a mapping with `type`."
    )


@site_pass(Factorize)
def factorize(site: Site, statistics: Statistics, rank: int, options: Factorize) -> LinearMap | Keep:
    """W -> the product B @ A of rank `rank` that the solver found closest, in its norm, in the form asked for."""
    B, A, bias = statistics.decomposition.truncate(rank, site.dtype)
    made = low_rank(B, A, bias, form="two_factor")
    if options.form != "two_factor":
        found = pivot(B, A)
        if not isinstance(found, PivotRefused):
            made = low_rank(B, A, bias, form="pivoted", pivots=found)
        elif options.form == "pivoted":
            return Keep(f"no stable pivoted form at rank {rank}: {found.reason}")
    if made.cost().bytes >= site.map.cost().bytes:
        return Keep(f"rank {rank} needs no fewer bytes than the dense weight")
    return made
