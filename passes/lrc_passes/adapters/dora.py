"""dora: LoRA on the direction of every row of the weight, and a trained length for it.

X  ->  RowNorm(inner: Sum(base: X*, adapter: Scale(s, Chain(B, A))), magnitude)
"""

from typing import Literal

import torch
from pydantic import Field

from lrc.maps import LinearMap, RowNorm
from lrc.run import AdapterOptions, Place, adapter
from lrc_passes.adapters.lora import beside


class Dora(AdapterOptions):
    """Low-rank adaptation of the rows' directions, and trained lengths."""

    type: Literal["dora"] = "dora"
    rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank).")

    def scaling(self, rank: int, alpha: float | None) -> float:
        """Return alpha / rank, or alpha / sqrt(rank)."""
        return 1.0 if alpha is None else alpha / (rank**0.5 if self.rslora else rank)


@adapter(Dora)
def dora(place: Place, options: Dora) -> LinearMap:
    """X -> (m / |V|) V x with V = X* + s B A; m starts at the rows' lengths |V|, so the sum starts as with LoRA.

    |V| is a constant in the backward pass. Dropout acts on the branch alone (in PEFT on the base as well).
    Source: Liu et al. (2024), arXiv:2402.09353, equations 5 and 11.
    """
    made = beside(place)
    bias = made.bias
    made.set_bias(None)
    if place.planning:
        length = torch.empty(made.out_features, dtype=place.site.dtype, device="meta")
    else:
        length = made.matrix().detach().float().norm(dim=1).to(place.site.dtype)
    return RowNorm(made, length, bias)
