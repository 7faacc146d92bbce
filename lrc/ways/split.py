"""A low-rank product plus the rest in few bits, both fitted in the norm of the loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field

from lrc.formats import FORMATS, FormatField, NumberFormat
from lrc.maps import LinearMap, Sum
from lrc.solvers.terms import ordered_terms
from lrc.ways.base import Target, Variant, WayOptions, shares_of, way
from lrc.ways.factorize import Share
from lrc.ways.factors import packed_product
from lrc.ways.quantize import label, packed


class SplitWay(WayOptions):
    """Sums of a product and a rest, both in few bits."""

    type: Literal["split"] = "split"
    ranks: list[Share] = Field(
        default=[0.02, 0.05], min_length=1, description="Ranks of the product, as shares of a weight's smaller side."
    )
    formats: list[FormatField] = Field(
        default=[FORMATS["nf2"], FORMATS["nf3"], FORMATS["nf4"]],
        min_length=1,
        description="How the rest is stored.",
    )
    factors: FormatField = Field(default=FORMATS["nf8"], description="How the factors are stored.")
    iterations: int = Field(default=1, ge=1, description="Turns of a product and a rest; the best one is taken.")

    def variants(self, out_features: int, in_features: int) -> Sequence["LowRankPlusRest"]:
        """Return every rank with every format of the rest."""
        ranks = [r for r in shares_of(self.ranks, min(out_features, in_features)) if r < min(out_features, in_features)]
        made = [(r, form) for form in self.formats for r in ranks]
        return [LowRankPlusRest(f"{label(f)} + {r}", r, f, self.factors, self.iterations) for r, f in made]


@dataclass(frozen=True)
class LowRankPlusRest(Variant):
    """The rank of the product, the formats of the rest and of the factors, and how often both are fitted."""

    rank: int
    form: NumberFormat
    factors: NumberFormat
    iterations: int


@way(SplitWay)
def split(target: Target, variant: LowRankPlusRest) -> LinearMap:
    """Return B A + Q: by turns B A is the best product for W - Q, rounded, and Q is W - B A, rounded with error feedback.

    Source: the turns of LQ-LoRA, Guo et al. (2024), arXiv:2311.12023. Departures: both steps in the norm of the loss, factors
    in few bits too, error feedback (GPTQ).
    """
    W, norm = target.weight, target.norm
    Q = torch.zeros_like(W)
    best: tuple[float, LinearMap] | None = None
    for turn in range(variant.iterations):
        terms = ordered_terms(W - Q, norm.left, norm.right, variant.rank, torch.float64) if turn else target.terms
        B, A = (factor.double() for factor in terms.product(variant.rank))
        product = packed_product(target, B, A, W - Q, variant.factors)
        rest = W - product.exact().weight
        found = packed(rest, target.feedback, variant.form, target.dtype, target.entries)
        Q = found.exact().weight
        loss = target.loss(product.exact().weight + Q)
        if best is None or loss < best[0]:
            best = loss, Sum(product, found, names=("low_rank", "rest"))
    assert best is not None, "there is at least one turn"
    return best[1]
