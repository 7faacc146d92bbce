"""flora: a small core tensor times one factor matrix per dimension of the weight.

X       ->  Sum(base: X*, adapter: Scale(s, Chain(F1, Gᵀ, F0ᵀ)))          linear; names B, R, A
Conv    ->  Sum(base: Conv*, adapter: Scale(s, Tucker(G; F0, F1, F2, F3)))
Lookup  ->  Sum(base: Lookup*, adapter: Scale(s, Chain(F1, Gᵀ, Lookup(F0))))
"""

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lrc.initialisers import InitialiserOptions
from lrc.maps import LinearMap, Patches, Sum, Tucker
from lrc.run import AdapterOptions, Place, adapter
from lrc_passes.adapters.parts import branch, normal


class Flora(AdapterOptions):
    """A Tucker core; `rank` is that of the inputs, and of the outputs too where `out_rank` is not given."""

    type: Literal["flora"] = "flora"
    out_rank: int | None = Field(default=None, ge=1, description="Rank of the outputs; that of the inputs without.")
    kernel_rank: int = Field(default=2, ge=1, description="Rank of every dimension of a kernel.")
    default_alpha: ClassVar[float | None] = None
    default_init: ClassVar[InitialiserOptions | None] = None
    grouped: ClassVar[bool] = True

    def scaling(self, rank: int, alpha: float | None) -> float:
        """Return alpha itself: the authors scale by a constant, whatever the rank."""
        return 1.0 if alpha is None else alpha


@adapter(Flora)
def flora(place: Place, options: Flora) -> LinearMap:
    """X -> X* + s G x_1 F0 x_2 F1 …, the core G zero at the start, the factors normal with variance 1 / (2 rank).

    Source: Si et al. (2024), arXiv:2405.14739. A rank above the size of its dimension is that size, and a note says so. In
    several groups the dimension of the inputs is that of one group.
    """
    site = place.site
    layout = site.layout
    channels, kernel = site.in_features, ()
    if isinstance(layout, Patches):
        channels, kernel = site.in_features // math.prod(layout.kernel), layout.kernel
    sizes = (channels, site.out_features, *kernel)
    asked = (place.rank, options.out_rank or place.rank, *(options.kernel_rank for _ in kernel))
    ranks = [min(size, rank) for size, rank in zip(sizes, asked, strict=True)]
    if ranks != list(asked):
        place.notes.append(f"ranks {','.join(map(str, ranks))} (in, out, kernel): no dimension has more than its size")
    factors = [factor(place, size, rank) for size, rank in zip(sizes, ranks, strict=True)]
    core = torch.zeros(ranks, dtype=site.dtype)
    if isinstance(layout, Patches):
        tucker = Tucker(core, factors, layout.geometry)
        made: LinearMap = tucker if place.dropout == 0.0 else branch(place, tucker, names=("tucker",))
    else:
        F0, F1 = factors
        made = branch(place, F1, core.T.contiguous(), layout.dense(F0.T.contiguous(), None), names=("B", "R", "A"))
    return Sum(place.base(), place.scaled(made), bias=place.bias, names=("base", "adapter"))


def factor(place: Place, size: int, rank: int) -> Tensor:
    """Return (size, rank), normal of standard deviation sqrt(1 / (2 rank)), in the site's dtype."""
    return normal(place, size, rank, std=math.sqrt(0.5 / rank)).to(place.site.dtype)
