"""unstructured: single entries of weights are dropped, or all but n of every m, or whole blocks.

W  ->  Sparse(W on a support)     the numbers that stay, and where they stand
"""

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from lrc.maps import Dense, Sparse
from lrc.program import Site
from lrc.run import Keep, Rewrite, Statistics
from lrc.run.pruners import PrunerOptions, site_pruner
from lrc.run.summary import stays
from lrc.solvers import Need
from lrc.solvers.checks import check_finite
from lrc.solvers.scores import SCORES
from lrc.solvers.splits.inputs import input_scale
from lrc.solvers.splits.support import Pattern, density_of, stored_as, strongest

if TYPE_CHECKING:
    from lrc_passes.prune import Prune


class Unstructured(PrunerOptions):
    """Drop entries of dense linear weights."""

    type: Literal["unstructured"] = "unstructured"
    criterion: Literal["magnitude", "wanda"] = Field(
        default="magnitude",
        description="|W|, or |W| times the root mean square of the entry's input (wanda; needs calibration).",
    )
    density: float | None = Field(default=None, gt=0, lt=1, description="Share of the entries that stay.")
    pattern: Pattern = Field(
        default="rows",
        description="What competes: the entries of each row (rows), of the whole weight (all), or n of every m inputs (`2:4`) "
        "or whole blocks (`16x16`).",
    )

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> Self:
        if (density_of(self.pattern) is None) == (self.density is None):
            raise ValueError('give `density`, or a pattern such as "2:4" that says it; not both')
        return self

    @property
    def needs(self) -> frozenset[Need]:
        """What the criterion needs."""
        return SCORES[self.criterion].needs


@site_pruner(Unstructured)
def unstructured(site: Site, statistics: Statistics, options: "Prune") -> Rewrite | Keep:
    """W -> its strongest entries, each as it was. Raises SolverError for scores that are not finite.

    Source of the criterion `wanda`: Sun et al. (2024), arXiv:2306.11695, which compares the entries of a row.
    """
    method, made = options.method, site.map
    assert isinstance(method, Unstructured), "the registry finds the method by its options"
    if not isinstance(made, Dense):
        return Keep(f"only dense linear weights lose single entries, this is {made!r}")
    if stays(site):
        return Keep(f"tied: {', '.join(site.tied)} reads the same weight, which would stay beside the entries")
    notes = input_scale(statistics.moments)[1] if Need.INPUTS in method.needs else ()
    entries = SCORES[method.criterion].entries
    assert entries is not None, "its criteria score entries"
    scores = entries(made.weight.detach(), statistics.moments)
    check_finite(f"the scores of {site.fqn} by {method.criterion}", scores)
    support = strongest(scores, method.pattern, method.density or 0.0)
    if not support.any():
        return Keep(f"a density of {method.density:g} leaves nothing of {made!r} by the pattern `{method.pattern}`")
    bias = None if made.bias is None else made.bias.detach()
    sparse = Sparse.of(made.weight.detach(), support, bias, stored_as(method.pattern))
    if sparse.cost().bytes >= made.cost().bytes:
        return Keep(f"the entries that stay need no fewer bytes: {sparse.cost().bytes}, the dense weight {made.cost().bytes}")
    kept = int(support.sum())
    return Rewrite(sparse, (f"{kept} of {support.numel()} entries stay by {method.criterion}", *notes, sparse.runs))
