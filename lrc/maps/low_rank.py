"""The two factors of any map that is a product: what an adapter amounts to as a plain LoRA."""

from typing import NamedTuple

import torch
from torch import Tensor

from lrc.maps.base import LinearMap, slot_shape
from lrc.maps.composites import Chain, Scale, Sum
from lrc.maps.drop import drop_closed_gates


class Factors(NamedTuple):
    """weight = scale B A, B (out_features, rank), A (rank, in_features), float64; bias (out_features,) or None."""

    B: Tensor
    A: Tensor
    scale: float = 1.0
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        """The number of terms."""
        return self.A.shape[0]


def low_rank(made: LinearMap) -> Factors | None:
    """Return the factors of a map that the algebra shows to be a product, or None.

    A chain is cut where it is narrowest; closed gates take their terms away; a constant in front stays one; the terms of a
    sum are laid side by side. So LoRA-XS, SoRA, LoLDU, PLP and the linear FLoRA are plain LoRAs, A and B of which these are.
    """
    if made.obstacle() is not None:
        return None
    if isinstance(made, Scale):
        inner = made.slots[0]
        found = low_rank(inner) if isinstance(inner, LinearMap) else None
        if found is None:
            return None
        _, bias = made.exact()
        return Factors(found.B, found.A, made.scale * found.scale, bias)
    if isinstance(made, Sum):
        terms = [low_rank(slot) if isinstance(slot, LinearMap) else None for slot in made.slots]
        B = [term.scale * term.B for term in terms if term is not None]
        A = [term.A for term in terms if term is not None]
        return Factors(torch.cat(B, 1), torch.cat(A), 1.0, made.exact().bias) if len(A) == len(terms) else None
    return _cut(made) if isinstance(made, Chain) else None


def _cut(made: Chain) -> Factors | None:
    opened = drop_closed_gates(made)
    while isinstance(opened, Chain):
        made, opened = opened, drop_closed_gates(opened)
    parts = made.exact_parts()
    widths = [slot_shape(slot)[0] for slot in made.slots[1:]]
    if not widths:
        return None
    at = 1 + widths.index(min(widths))
    B, A = _product([part.weight for part in parts[:at]]), _product([part.weight for part in parts[at:]])
    return Factors(B, A, 1.0, made.exact().bias)


def _product(matrices: list[Tensor]) -> Tensor:
    product = matrices[0]
    for matrix in matrices[1:]:
        product = product @ matrix
    return product
