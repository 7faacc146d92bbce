"""compacter: a bottleneck after the weight, whose two projections are sums of Kronecker products.

X  ->  Chain(adapter: Bottleneck(up: Kronecker, down: Kronecker), base: X*)

%h = linear(%x, fc.weight, fc.bias);  %y = %h + up(gelu(down(%h)))

An activation stands in it, so there is nothing to merge: it is exported as the operations that it is.
"""

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lrc.initialisers import InitialiserOptions
from lrc.maps import ACTIVATIONS, Bottleneck, Chain, Kronecker, LinearMap
from lrc.program import Site
from lrc.run import AdapterOptions, Keep, Place, adapter
from lrc_passes.adapters.parts import biased_base, normal, own_biases


class Compacter(AdapterOptions):
    """PHM bottlenecks; `rank` is the width of the bottleneck, out_features / reduction where it is not given."""

    type: Literal["compacter"] = "compacter"
    n: int = Field(default=4, ge=1, description="Summands; it divides the features and the width of the bottleneck.")
    reduction: int = Field(default=32, ge=1, description="Features over the width of the bottleneck.")
    phm_rank: int | None = Field(default=1, ge=1, description="Rank of the fast factors; null: full matrices (PHM adapters).")
    shared_rule: bool = Field(default=True, description="Whether all sites of the pass share one slow rule.")
    shared_fast: bool = Field(
        default=False,
        description="Whether sites of one size share their fast factors: one pair for all downs, one for all ups.",
    )
    rule_std: float | None = Field(
        default=None, gt=0, description="Standard deviation of the slow rule at the start: 1e-4 where it is shared, else 0.01."
    )
    activation: Literal[*ACTIVATIONS] = Field(  # type: ignore[valid-type]  # the list of functions is one mapping
        default="gelu_new", description="Between the two projections."
    )
    default_alpha: ClassVar[float | None] = None
    default_init: ClassVar[InitialiserOptions | None] = None
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "embedding"})

    def rank_for(self, shape: tuple[int, int]) -> int:
        """Return the width of the bottleneck."""
        return max(1, shape[0] // self.reduction)

    def obstacle(self, site: Site, rank: int) -> str | None:
        """Return that n does not divide what it has to, where it does not."""
        if site.out_features % self.n or rank % self.n:
            return f"n = {self.n} does not divide {site.out_features} features and a bottleneck of {rank}"
        return super().obstacle(site, rank)


@adapter(Compacter)
def compacter(place: Place, options: Compacter) -> LinearMap | Keep:
    """X -> h + U act(D h), h = X* x + bias. Sources: Mahabadi et al. (2021), arXiv:2106.04647; section 3 and the code."""
    reason = own_biases(place)
    if reason is not None:
        return Keep(reason)
    if place.dropout:
        place.notes.append("no dropout: the method has none")
    features, width = place.site.out_features, place.rank
    rule = place.shared.get("rule") if options.shared_rule else None
    if rule is None:
        std = options.rule_std or (1e-4 if options.shared_rule else 0.01)
        rule = nn.Parameter(normal(place, options.n, options.n, options.n, std=std).to(place.site.dtype))
        if options.shared_rule:
            place.shared["rule"] = rule
    down = projection(place, rule, features, width, options, "down")
    up = projection(place, rule, width, features, options, "up")
    return Chain(Bottleneck(up, down, options.activation), biased_base(place, place.base()), names=("adapter", "base"))


def projection(place: Place, rule: Tensor, in_features: int, out_features: int, options: Compacter, way: str) -> Kronecker:
    """Return a PHM layer with a bias of zeros; its fast factors start uniform in ±sqrt(2) sqrt(6 / (rows + columns))."""
    name = f"fast {way} {in_features} {out_features}"
    left, right = place.shared.get(name) or fast(place, in_features // options.n, out_features // options.n, options)
    if options.shared_fast:
        place.shared[name] = left, right
    return Kronecker(rule, left, right, torch.zeros(out_features, dtype=place.site.dtype))


def fast(place: Place, rows: int, columns: int, options: Compacter) -> tuple[nn.Parameter, nn.Parameter]:
    """Return S (n, rows, rank) and T (n, rank, columns); of full rank T is the identity, and not trained."""
    n, rank, dtype = options.n, options.phm_rank, place.site.dtype
    if rank is None:
        eye = torch.eye(columns, dtype=dtype).expand(n, -1, -1).contiguous()
        return nn.Parameter(glorot(place, n, rows, columns).to(dtype)), nn.Parameter(eye, requires_grad=False)
    left, right = glorot(place, n, rows, rank), glorot(place, n, rank, columns)
    return nn.Parameter(left.to(dtype)), nn.Parameter(right.to(dtype))


def glorot(place: Place, n: int, rows: int, columns: int) -> Tensor:
    """Return (n, rows, columns), every slice by Glorot's rule with gain sqrt(2)."""
    bound = math.sqrt(2) * math.sqrt(6 / (rows + columns))
    return torch.empty(n, rows, columns).uniform_(-bound, bound, generator=place.generator)
