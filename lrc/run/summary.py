"""Maps in numbers, for decisions: of a map that exists, and of a low-rank product that is only planned."""

import torch

from lrc.maps import LinearMap, low_rank
from lrc.program import Site
from lrc.run.plan import Summary


def summarize(made: LinearMap) -> Summary:
    """Return the text and cost of a map; FLOPs are for one token."""
    cost = made.cost(1)
    return Summary(repr(made), cost.parameters, cost.bytes, cost.flops)


def sketch(site: Site, rank: int, form: str, *, bias: bool) -> Summary:
    """Return what a rank-`rank` product in `form` would cost at `site`, without making one."""
    out_features, in_features = site.out_features, site.in_features
    with torch.device("meta"):
        B = torch.empty(out_features, rank, dtype=site.dtype)
        A = torch.empty(rank, in_features, dtype=site.dtype)
        offset = torch.empty(out_features, dtype=site.dtype) if bias else None
        return summarize(low_rank(B, A, offset, form=form))
