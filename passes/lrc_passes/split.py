"""split: a dense weight becomes a low-rank product plus a rest that is cheap to store.

W  ->  Sum(Chain(B, A), Sparse)       a fixed support: the numbers, and where they stand
W  ->  Sum(Chain(B, A), Quantized)    packed codes and their scales
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator

from lrc.errors import UsageError
from lrc.formats import NumberFormat
from lrc.maps import Chain, LinearMap, Quantized, Rows, Scale, Sparse, SparseLowRank, Sum
from lrc.program import Program, Site
from lrc.ranks import FixedRank, ParamsKept, RankField
from lrc.ranks.knapsack import cheapest_choice
from lrc.run import Keep, Rewrite, Session, Statistics, StoredOptions
from lrc.run.solved_pass import SolvedPass, solved_pass
from lrc.solvers.checks import check_finite
from lrc.solvers.splits import LqSplitter, QuantizedOptions, SparseOptions, SplitterOptions
from lrc.solvers.splits import Split as SplitParts
from lrc.solvers.splits.bits import BitsBudget
from lrc.solvers.splits.support import density_of, stored_as
from lrc.spec.registry import SPLITTERS, Registered


class Split(StoredOptions):
    """Split dense weights into a low-rank product and a sparse or quantised rest."""

    type: Literal["split"] = "split"
    solver: Annotated[SplitterOptions, Registered(SPLITTERS)] = Field(
        default=LqSplitter(), description="How a weight is split: a name, or a mapping with `type`."
    )
    rank: RankField = Field(
        description="Rank of the product: a whole number, {fraction: …}, {breakeven: …}; or {params_kept: …}, of every weight, "
        "which `rank_share` divides between the product and a sparse rest."
    )
    rank_share: float | None = Field(
        default=None, ge=0, lt=1, description="Share of the kept numbers that the product gets, under `params_kept`."
    )

    @model_validator(mode="after")
    def _one_way_to_say_how_much(self) -> Self:
        """Refuse amounts that contradict each other, or leave the size open."""
        if isinstance(self.rank, ParamsKept):
            if not isinstance(self.solver, SparseOptions):
                raise ValueError("`params_kept` counts numbers, and a quantised rest has as many as the weight; give a rank")
            if self.solver.density is not None:
                raise ValueError("`params_kept` and `rank_share` say the density already; leave out `density`")
            if (self.rank_share is None) == (density_of(self.solver.pattern) is None):
                raise ValueError(
                    "`params_kept` needs `rank_share`, or a pattern `n:m`, which leaves the product the rest; not both"
                )
            return self
        if not self.rank.by_shape:
            (policy,) = type(self.rank).model_fields
            raise ValueError(f"`split` has no `rank: {{{policy}: …}}`; give a whole number, fraction, breakeven or params_kept")
        if self.rank_share is not None:
            raise ValueError("`rank_share` divides a budget: give it with `rank: {params_kept: …}`")
        sparse = isinstance(self.solver, SparseOptions)
        if sparse and self.solver.density is None and density_of(self.solver.pattern) is None:  # type: ignore[attr-defined]
            raise ValueError('give `solver.density`, a pattern such as "2:4", or `rank: {params_kept: …}` with `rank_share`')
        return self


@dataclass(frozen=True)
class Shares:
    """How much each part of a split gets."""

    rank: int
    density: float | None


def shares(options: Split, out_features: int, in_features: int) -> Shares:
    """Return the rank and the density that `options` mean for one weight.

    Under `params_kept` f and `rank_share` k: rank = k f m n / (m + n), density = (1 - k) f; with a pattern n:m the density
    is n/m, and the rank is what f leaves. Source: the budgets of OATS, arXiv:2409.13652, and HASSLE-free, arXiv:2502.00899.
    """
    m, n, solver = out_features, in_features, options.solver
    if not isinstance(options.rank, ParamsKept):
        return Shares(min(options.rank.most(m, n), m, n), getattr(solver, "density", None))
    assert isinstance(solver, SparseOptions), "checked with the options"
    f, fixed = options.rank.params_kept, density_of(solver.pattern)
    if fixed is not None:
        return Shares(max(0, int((f - fixed) * m * n / (m + n) + 1e-9)), None)
    share = options.rank_share or 0.0
    return Shares(int(share * f * m * n / (m + n) + 1e-9), (1 - share) * f)


def chosen_formats(
    program: Program, session: Session, options: Split, fqns: Sequence[str], solved: SolvedPass
) -> dict[str, Split]:
    """Return the options of every site, each with the format that one budget over all of them gives it."""
    solver = options.solver
    if not isinstance(solver, LqSplitter) or solver.bits is None:
        return dict.fromkeys(fqns, options)
    ways = [with_format(options, form) for form in solver.formats]
    losses: dict[str, list[float]] = {fqn: [] for fqn in fqns}
    for way in ways:
        for fqn, loss in solved.measured_with(program, session, dict.fromkeys(fqns, way), loss_of).items():
            losses[fqn].append(loss)
    free = [fqn for fqn in fqns if not any(map(math.isinf, losses[fqn]))]
    if not free:
        return dict.fromkeys(fqns, options)
    shapes = [(program.sites[fqn].out_features, program.sites[fqn].in_features) for fqn in free]
    costs = [[8 * form.stored_bytes(shape) for form in solver.formats] for shape in shapes]
    budget = bits_for(program, options, solver.bits, free)
    places, note = cheapest_choice(
        [losses[fqn] for fqn in free], costs, budget, what="bits for the rests", where="solver.bits"
    )  # fmt: skip
    spent = sum(cost[place] for cost, place in zip(costs, places, strict=True)) / sum(map(math.prod, shapes))
    notices = [f"formats: {spent:.3f} bits a number on average", *([note] if note else [])]
    session.notices += [text for text in notices if text not in session.notices]  # applying chooses again
    chosen = {fqn: ways[place] for fqn, place in zip(free, places, strict=True)}
    return {fqn: chosen.get(fqn, options) for fqn in fqns}


def with_format(options: Split, form: NumberFormat) -> Split:
    """Return the options of one site, with a format in place of a budget."""
    assert isinstance(options.solver, LqSplitter), "no other splitter has a budget of bits"
    return options.model_copy(
        update={"solver": options.solver.model_copy(update={"format": form, "bits": None, "formats": []})}
    )


def loss_of(site: Site, statistics: Statistics, options: Split, generator: torch.Generator) -> float:
    """Return the squared error of a site's split, infinite for a site that is not split."""
    found = parts(site, statistics, options, generator)
    return math.inf if isinstance(found, Keep) else found.loss


def bits_for(program: Program, options: Split, budget: BitsBudget, fqns: Sequence[str]) -> float:
    """Return how many bits the rests of all sites together may take.

    A size is that of the whole model: what stays and the products are taken off.
    """
    sites = [program.sites[fqn] for fqn in fqns]
    if budget.bits is not None:
        return budget.bits * sum(site.out_features * site.in_features for site in sites)
    assert budget.size_mb is not None, "a budget is one of the two"
    stays = program.size()[1] - sum(site.map.cost().bytes - site.map.bias_cost(1).bytes for site in sites)
    ranks = [shares(options, site.out_features, site.in_features).rank for site in sites]
    products = sum(
        r * (site.out_features + site.in_features) * site.dtype.itemsize for r, site in zip(ranks, sites, strict=True)
    )
    left = 8 * (1e6 * budget.size_mb - stays - products)
    if left <= 0:
        raise UsageError(
            "solver.bits.size_mb",
            expected=f"more than {(stays + products) / 1e6:.4g} MB, what stays dense and the products need",
            got=f"{budget.size_mb:g} MB",
        )
    return left


@solved_pass(Split, chosen_formats)
def split(site: Site, statistics: Statistics, options: Split, generator: torch.Generator) -> Rewrite | Keep:
    """W -> the sum of a product and a rest, as the splitter finds them."""
    found = parts(site, statistics, options, generator)
    if isinstance(found, Keep):
        return found
    bias = site.map.dense().bias
    rest = rest_of(found, options.solver)
    made: LinearMap
    if found.A.shape[0]:
        kind = SparseLowRank if isinstance(rest, Sparse) else Sum
        made = kind(product_of(found), rest, names=("low_rank", "rest"), bias=bias)
    else:
        made = rest.with_bias(None if bias is None else torch.nn.Parameter(bias))
    if made.cost().bytes >= site.map.cost().bytes:
        return Keep(f"the split needs no fewer bytes: {made.cost().bytes}, the dense weight {site.map.cost().bytes}")
    error = () if found.error is None else (f"relative error {found.error:.2%} in the splitter's norm",)
    runs = (rest.runs,) if isinstance(rest, Sparse) else ()
    return Rewrite(made, (*error, *found.notes, *runs))


def product_of(found: SplitParts) -> LinearMap:
    """Return the product as a map, behind its constant where there is one."""
    product = Chain(found.B, found.A)
    return product if found.scaling == 1.0 else Scale(product, found.scaling)


def parts(site: Site, statistics: Statistics, options: Split, generator: torch.Generator) -> SplitParts | Keep:
    """Return the parts that the splitter finds, or why there are none. SolverError for a weight that is not finite."""
    if not isinstance(site.layout, Rows) or site.fqn in site.program.maps:
        return Keep(f"only dense linear weights are split, this is {site.map!r}")
    weight = site.map.dense().weight
    check_finite("weight", weight)
    wanted = shares(options, site.out_features, site.in_features)
    if isinstance(options.rank, FixedRank) and options.rank.rank > min(weight.shape):
        return Keep(f"rank {options.rank.rank} is more than the smaller side of {site.out_features} x {site.in_features}")
    solver: Any = options.solver
    if isinstance(solver, SparseOptions):
        solver = solver.model_copy(update={"density": wanted.density})
    found: SplitParts = SPLITTERS.for_options(solver)(weight, statistics.moments, wanted.rank, solver, generator)
    return found


def rest_of(found: SplitParts, solver: SplitterOptions) -> LinearMap:
    """Return what is beside the product as a map: on its support, or in its format."""
    if isinstance(solver, QuantizedOptions):
        assert found.encoded is not None, "a quantised rest is stored encoded"
        return Quantized(found.encoded, (found.rest.shape[0], found.rest.shape[1]), solver.format, found.rest.dtype)
    assert isinstance(solver, SparseOptions), "a splitter has one or the other rest"
    assert found.support is not None, "a sparse rest has a support"
    return Sparse.of(found.rest, found.support, pattern=stored_as(solver.pattern))
