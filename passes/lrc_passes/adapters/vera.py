"""vera: two random matrices that all sites share, and two trained vectors each.

X  ->  Sum(base: X*, adapter: Chain(Diagonal(b), B*, Diagonal(d), A*))      A*, B* cut from matrices that all sites share
"""

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lrc.initialisers import InitialiserOptions
from lrc.maps import Chain, Diagonal, Dropout, LinearMap, Sum
from lrc.run import AdapterOptions, Place, adapter


class Vera(AdapterOptions):
    """Vector-based adaptation: shared random projections, trained diagonals."""

    type: Literal["vera"] = "vera"
    d_initial: float = Field(default=0.1, strict=False, description="Where the diagonal between the projections starts.")
    seed: int = Field(default=0, ge=0, description="Of the shared projections (PEFT's `projection_prng_key`).")
    default_rank: ClassVar[int] = 256
    default_alpha: ClassVar[float | None] = None
    default_init: ClassVar[InitialiserOptions | None] = None
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})


@adapter(Vera)
def vera(place: Place, options: Vera) -> LinearMap:
    """X -> X* + diag(b) B diag(d) A, b = 0 and d = `d_initial` at the start: the sum starts as the base.

    A (rank, in_features) and B (out_features, rank) are the first columns and rows of matrices as large as the largest site,
    uniform in ±sqrt(6 / fan_in), drawn from `seed`, as in PEFT. Source: Kopiczko et al. (2024), arXiv:2310.11454, equation 2.
    """
    site, r = place.site, place.rank
    A, B = projections(place, options)
    parts: list[Tensor | LinearMap] = [
        Diagonal(torch.zeros(site.out_features, dtype=site.dtype)),
        nn.Parameter(B[: site.out_features], requires_grad=False),
        Diagonal(torch.full((r,), options.d_initial, dtype=site.dtype)),
        nn.Parameter(A[:, : site.in_features], requires_grad=False),
    ]
    names = ["lambda_b", "B", "lambda_d", "A"]
    if place.dropout:
        parts.append(Dropout(site.in_features, place.dropout, site.dtype))
        names.append("dropout")
    return Sum(place.base(), Chain(*parts, names=names), bias=place.bias, names=("base", "adapter"))


def projections(place: Place, options: Vera) -> tuple[Tensor, Tensor]:
    """Return A (rank, largest in_features) and B (largest out_features, rank): one pair for all sites of a rank and dtype."""
    key = f"vera {place.rank} {place.site.dtype}"
    if key not in place.shared:
        m, n = (max(shape[i] for shape in place.shared["shapes"]) for i in (0, 1))
        if place.planning:
            made = torch.empty(place.rank, n, device="meta"), torch.empty(m, place.rank, device="meta")
        else:
            generator = torch.Generator().manual_seed(options.seed)
            made = uniform(place.rank, n, generator), uniform(m, place.rank, generator)
        place.shared[key] = tuple(t.to(place.site.dtype) for t in made)
    A, B = place.shared[key]
    return A, B


def uniform(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Return a matrix uniform in ±sqrt(6 / columns)."""
    bound = math.sqrt(6.0 / columns)
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
