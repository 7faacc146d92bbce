"""factorize: a dense weight, kernel or table becomes a product of rank r.

W                 ->  Chain(B, A)        r(m+n) numbers; or
W                 ->  Pivoted(P, Z)      the same product in r(m+n-r) numbers and an index of m
Conv              ->  ConvChain(B, A)    the kernel to r channels, and a 1 x 1 convolution after it; or
Conv              ->  ConvChain(…)       several smaller kernels (`lrc.forms`: spatial, tucker2, cp)
Lookup            ->  Chain(B, Lookup)   a table of r columns, and a matrix after it

%y = linear(%x, fc.weight: f32[m, n], fc.bias)
%h = linear(%x, fc.A: f32[r, n]);  %y = linear(%h, fc.B: f32[m, r], fc.bias)
"""

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from lrc.forms import kernel_form
from lrc.maps import LinearMap, Pivoted
from lrc.program import Site
from lrc.run import Keep, RankedOptions, Rewrite, Statistics, site_pass
from lrc.run.fronts import in_kernels
from lrc.solvers import KfacSolver, Refusal, SolverOptions, pivot
from lrc.spec.registry import SOLVERS, Registered


class Factorize(RankedOptions):
    """Replace dense weights by low-rank products."""

    type: Literal["factorize"] = "factorize"
    solver: Annotated[SolverOptions, Registered(SOLVERS)] = Field(
        default=KfacSolver(), description="How a weight is decomposed: a name, or a mapping with `type`."
    )


@site_pass(Factorize)
def factorize(site: Site, statistics: Statistics, rank: int, options: Factorize) -> LinearMap | Rewrite | Keep:
    """W -> the product B @ A of rank `rank` that the solver found closest, in its norm, in the form asked for."""
    kernels = kernel_form(options.form)
    if kernels is not None and kernels.fits(site.layout):
        return smaller(in_kernels(site, statistics.decomposition, kernels, statistics.ranks or (rank,)), site, rank)
    B, A, bias = statistics.decomposition.truncate(rank, site.dtype)
    two_factor = site.layout.product(B, A, bias)
    if options.form == "two_factor" or "pivoted" not in site.layout.forms:
        return smaller(two_factor, site, rank)
    found = pivot(*statistics.decomposition.product(rank), dtype=site.dtype)
    if isinstance(found, Refusal):
        if options.form == "pivoted":
            return Keep(f"no stable pivoted form at rank {rank}: {found.reason}")
        return in_two_factors(site, statistics, rank, options, found.reason)
    made = Pivoted(found.P, found.Z, found.index, found.side, bias)
    if options.form == "auto" and two_factor.cost().bytes <= made.cost().bytes:  # the index outweighs what the form saves
        return smaller(two_factor, site, rank)
    return smaller(made, site, rank)


def in_two_factors(site: Site, statistics: Statistics, rank: int, options: Factorize, reason: str) -> Rewrite | Keep:
    """Return two factors in place of a pivoted form that is not stable; under a budget, of a rank that takes no more."""
    note = f"two factors in place of the pivoted form: {reason}"
    if options.rank.budget:
        m, n = site.out_features, site.in_features
        assert options.round_to != "auto", "a run settles it"
        fits = max(1, rank * (m + n - rank) // (m + n))
        rank = fits // options.round_to * options.round_to or fits
    B, A, bias = statistics.decomposition.truncate(rank, site.dtype)
    made = smaller(site.layout.product(B, A, bias), site, rank, note)
    return made if isinstance(made, Keep) else replace(made, rank=rank)


def smaller(made: LinearMap, site: Site, rank: int, *notes: str) -> Rewrite | Keep:
    """Return the new map, or the reason to keep a dense weight that is no larger."""
    if made.cost().bytes >= site.map.cost().bytes:
        return Keep(f"rank {rank} needs no fewer bytes than the dense weight")
    return Rewrite(made, notes)
