"""A product of two factors, or the same in pivoted form, at some ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from lrc.maps import Chain, LinearMap, Pivoted
from lrc.solvers import Refusal, pivot
from lrc.ways.base import Target, Variant, WayOptions, shares_of, way

Share = Annotated[float, Field(gt=0, le=1)]


class FactorizeWay(WayOptions):
    """Products of low rank, in full numbers."""

    type: Literal["factorize"] = "factorize"
    ranks: list[Share] = Field(
        default=[0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8],
        min_length=1,
        description="Ranks, as shares of a weight's smaller side.",
    )
    forms: list[Literal["two_factor", "pivoted"]] = Field(
        default=["two_factor", "pivoted"], min_length=1, description="How a product is stored."
    )

    def variants(self, out_features: int, in_features: int) -> Sequence["Product"]:
        """Return the ranks that make a product smaller than the weight, in every form."""
        m, n = out_features, in_features
        made = [
            Product(f"{form} {r}", r, form) for form in self.forms for r in shares_of(self.ranks, min(m, n)) if r < min(m, n)
        ]
        return [v for v in made if v.rank * (m + n - (v.rank if v.form == "pivoted" else 0)) < m * n]


@dataclass(frozen=True)
class Product(Variant):
    """A rank and a form."""

    rank: int
    form: Literal["two_factor", "pivoted"]


@way(FactorizeWay)
def factorize(target: Target, variant: Product) -> LinearMap | None:
    """Return the product of the first terms, or None where the pivoted form is not stable."""
    B, A = target.terms.product(variant.rank)
    if variant.form == "two_factor":
        return Chain(B.to(target.dtype).contiguous(), A.to(target.dtype).contiguous())
    found = pivot(B, A, dtype=target.dtype)
    return None if isinstance(found, Refusal) else Pivoted(found.P, found.Z, found.index, found.side)
