"""lora: a low-rank product beside the frozen weight.

X       ->  Sum(base: X*, adapter: Scale(alpha / r, Chain(B, A)))
Conv    ->  Sum(base: Conv*, adapter: Scale(alpha / r, ConvChain(B, A)))      A has the kernel, B is 1 x 1
Lookup  ->  Sum(base: Lookup*, adapter: Scale(alpha / r, Chain(B, Lookup)))
"""

from typing import Literal

from lrc.maps import LinearMap, Sum
from lrc.run import AdapterOptions, Place, adapter


class Lora(AdapterOptions):
    """Low-rank adaptation, scaled by alpha / rank."""

    type: Literal["lora"] = "lora"


@adapter(Lora)
def lora(place: Place, options: Lora) -> LinearMap:
    """X -> X* + (alpha / r) B A. Source: Hu et al. (2022), arXiv:2106.09685, equation 3."""
    return beside(place)


def beside(place: Place) -> LinearMap:
    """Return the frozen base plus `scaling` B A."""
    base, initial = place.started()
    B = initial.B if initial.core is None else initial.B @ initial.core
    branch = place.scaled(place.product(B, initial.A))
    return Sum(base, branch, bias=place.bias, names=("base", "adapter"))
