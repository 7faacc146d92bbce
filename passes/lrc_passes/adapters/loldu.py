"""loldu: the leading pivots of the weight's own LU decomposition are trained, one number each.

X  ->  Sum(base: X*, adapter: Scale(s, Chain(P, L*, Sum(Diagonal z, Diagonal* -d), U*)))      W = P L diag(d) U

The frozen weight stays what it is, and -d stands beside z. The authors take s P L diag(d) U out of the weight in place of
that; in exact numbers it is the same function, and with rounding this one starts at the weight itself.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lrc.initialisers import InitialiserOptions
from lrc.maps import Chain, Diagonal, LinearMap, Permutation, Sum, Triangular
from lrc.program import Site
from lrc.run import AdapterOptions, Place, adapter
from lrc.solvers.ldu import Ldu, ldu
from lrc_passes.adapters.parts import branch, constant, number, times

Start = Literal["lu", "uniform", "s_uniform", "normal", "s_normal", "constant", "ones", "zeros"]


class Loldu(AdapterOptions):
    """The first `rank` pivots of W = P L D U are trained; s = alpha / rank."""

    type: Literal["loldu"] = "loldu"
    z_init: Start = Field(
        default="lu",
        description="Where the pivots start: at their own values, which changes nothing; uniform or normal with their mean and "
        "deviation (s_: with the standard ones); constant at their mean; ones; zeros.",
    )
    train_scale: bool = Field(default=False, description="Whether s is trained too: one number a site.")
    default_rank: ClassVar[int] = 64
    default_alpha: ClassVar[float | None] = 1.0
    default_init: ClassVar[InitialiserOptions | None] = None

    def obstacle(self, site: Site, rank: int) -> str | None:
        """Return that the weight has too few pivots, where it has."""
        most = min(site.shape)
        return f"the weight has {most} pivots, and rank {rank} was asked for" if rank > most else super().obstacle(site, rank)


@adapter(Loldu)
def loldu(place: Place, options: Loldu) -> LinearMap:
    """X -> X* + s P L diag(z - d) U, z trained. Source: Shi et al. (2024), arXiv:2410.13618, equations 3 to 6.

    With `train_scale` it is X* + P L (s diag(z) - s0 diag(d)) U, s0 where s starts: what stands in the weight's place in the
    authors' code has s0 in it too. Decomposed in float64. Of a convolution it is the matrix of patches, of an embedding the
    table (as the authors have it).
    """
    site = place.site
    table = site.kind == "embedding"
    found = sizes_only(site, place.rank) if place.planning else ldu(turned(site.map.dense().weight, table), place.rank)
    dtype, spatial = site.dtype, site.layout.spatial
    d = found.d.to(dtype)
    z = started(d, options.z_init, place.generator)
    pivots: LinearMap = Diagonal(z, spatial=spatial)
    s = place.scaling if options.train_scale else 1.0
    if options.train_scale:
        pivots = times(number(place, s), Chain(pivots, names=("z",)))
    between = Sum(pivots, Diagonal(constant(-s * d), spatial=spatial), names=("z", "start"))
    parts: tuple[LinearMap, ...]
    if site.kind == "linear":
        L, U = Triangular.of(found.L.to(dtype)), Triangular.of(found.U.to(dtype), upper=True, unit=found.unit)
        parts = (Permutation(found.order.argsort(), dtype), L, between, U)
        names: tuple[str, ...] = ("P", "L", "D", "U")
    else:
        left, right = found.L[found.order.argsort()], found.U
        left, right = (right.T, left.T) if table else (left, right)
        B, A = left.to(dtype).contiguous(), right.to(dtype).contiguous()
        parts, names = (site.layout.pointwise(B), between, site.layout.dense(A, None)), ("B", "D", "A")
    for part in parts:
        if part is not between:
            part.requires_grad_(False)
    made = branch(place, *parts, names=names)
    made = made if options.train_scale else place.scaled(made)
    return Sum(place.base(), made, bias=place.bias, names=("base", "adapter"))


def turned(weight: Tensor, table: bool) -> Tensor:
    """Return the matrix that is decomposed: of an embedding the table itself."""
    return weight.T if table else weight


def sizes_only(site: Site, rank: int) -> Ldu:
    """Return factors that have sizes and no numbers."""
    rows, columns = site.shape[::-1] if site.kind == "embedding" else site.shape
    with torch.device("meta"):
        order = torch.empty(rows, dtype=torch.int64)
        return Ldu(order, torch.empty(rows, rank), torch.empty(rank), torch.empty(rank, columns), True)


def started(d: Tensor, start: Start, generator: torch.Generator) -> Tensor:
    """Return where the pivots start, (rank,), in the dtype of d."""
    if start == "lu" or d.is_meta:
        return d.clone()
    mean, size = d.double().mean(), len(d)
    z = {
        "uniform": lambda: (torch.rand(size, generator=generator) - 0.5) * mean.abs(),
        "s_uniform": lambda: 2 * torch.rand(size, generator=generator) - 1,
        "normal": lambda: mean + torch.randn(size, generator=generator) * (d.double().std() if size > 1 else 0.0),
        "s_normal": lambda: torch.randn(size, generator=generator),
        "constant": lambda: mean.expand(size),
        "ones": lambda: torch.ones(size),
        "zeros": lambda: torch.zeros(size),
    }[start]()
    return z.to(d.dtype).contiguous()
