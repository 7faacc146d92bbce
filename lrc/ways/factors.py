"""A product of low rank whose factors are stored in few bits: factorized first, quantised after."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field

from lrc.formats import FORMATS, FormatField, NumberFormat
from lrc.maps import Chain, LinearMap
from lrc.solvers.feedback import Feedback
from lrc.ways.base import Target, Variant, WayOptions, shares_of, way
from lrc.ways.factorize import Share
from lrc.ways.quantize import label, packed


class FactorsWay(WayOptions):
    """Products of low rank, in few bits."""

    type: Literal["quantized_factors"] = "quantized_factors"
    ranks: list[Share] = Field(
        default=[0.1, 0.2, 0.3, 0.4, 0.5], min_length=1, description="Ranks, as shares of a weight's smaller side."
    )
    formats: list[FormatField] = Field(
        default=[FORMATS["nf3"], FORMATS["nf4"]],
        min_length=1,
        description="How both factors are stored.",
    )

    def variants(self, out_features: int, in_features: int) -> Sequence["PackedProduct"]:
        """Return every rank in every format."""
        ranks = [r for r in shares_of(self.ranks, min(out_features, in_features)) if r <= min(out_features, in_features)]
        return [PackedProduct(f"{r} in {label(form)}", r, form) for form in self.formats for r in ranks]


@dataclass(frozen=True)
class PackedProduct(Variant):
    """A rank and a format."""

    rank: int
    form: NumberFormat


@way(FactorsWay)
def quantized_factors(target: Target, variant: PackedProduct) -> LinearMap:
    """Return B A of the first terms, in the format."""
    B, A = target.terms.product(variant.rank)
    return packed_product(target, B.double(), A.double(), target.weight, variant.form)


def packed_product(target: Target, B: torch.Tensor, A: torch.Tensor, wanted: torch.Tensor, form: NumberFormat) -> Chain:
    """Return B A in a format, near `wanted` (out_features, in_features).

    A is rounded first, with C as the Gram matrix of its inputs; B is fitted anew to the rounded A, by least squares, and
    rounded with A C Aᵀ as that of its own.
    """
    first = packed(A, target.feedback, form, target.dtype, target.feedback.diagonal)
    rounded = first.exact().weight
    inner = rounded @ target.gram @ rounded.T
    inner.diagonal().add_(1e-6 * float(inner.diagonal().mean()) or 1.0)  # a weight of zeros has a product of zeros
    fitted = torch.cholesky_solve((wanted @ target.gram @ rounded.T).T, torch.linalg.cholesky(inner)).T
    worth = target.outer[:, None] * inner.diagonal()
    return Chain(packed(fitted, Feedback(inner), form, target.dtype, worth), first)
