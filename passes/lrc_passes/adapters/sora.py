"""sora: a gate between the factors, which training drives to exact zeros.

X  ->  Sum(base: X*, adapter: Scale(alpha / r, Chain(B, Gate g, A)))      merge drops the components of closed gates
"""

from typing import Literal

import torch
from pydantic import Field

from lrc.maps import Gate, LinearMap, Sum
from lrc.run import AdapterOptions, Place, adapter
from lrc_passes.adapters.parts import branch, normal


class Sora(AdapterOptions):
    """Low-rank adaptation with a gate of `rank` entries; `rank` is the most that there can be."""

    type: Literal["sora"] = "sora"
    gate: Literal["normal", "ones"] = Field(default="normal", description="Where the gate starts: standard normal, or ones.")


@adapter(Sora)
def sora(place: Place, options: Sora) -> LinearMap:
    """X -> X* + (alpha / r) B diag(g) A; the constant stays when components go. The gate is kept in float32.

    Source: Ding et al. (2023), arXiv:2311.11696, equation 3.
    """
    base, initial = place.started()
    layout, dtype = place.site.layout, place.site.dtype
    g = normal(place, place.rank) if options.gate == "normal" else torch.ones(place.rank)
    gate = Gate(g, spatial=layout.spatial)
    B, A = layout.pointwise(initial.B.to(dtype).contiguous()), layout.dense(initial.A.to(dtype).contiguous(), None)
    made = place.scaled(branch(place, B, gate, A, names=("B", "gate", "A")))
    return Sum(base, made, bias=place.bias, names=("base", "adapter"))
