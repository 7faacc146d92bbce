"""colora: LoRA with as much rank as a layer contributes, its biases trained beside it.

X  ->  Sum(base: X*, adapter: Chain(B, A), bias trained)      with `rank: {contribution: …}`
"""

from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from lrc.maps import LinearMap, Sum
from lrc.run import AdapterOptions, Place, adapter


class Colora(AdapterOptions):
    """Contribution-based low-rank adaptation: scaled by 1, biases trained."""

    type: Literal["colora"] = "colora"
    train_bias: bool = Field(default=True, description="Whether the biases of adapted sites are trained.")
    default_alpha: ClassVar[float | None] = None


@adapter(Colora)
def colora(place: Place, options: Colora) -> LinearMap:
    """X -> X* + B A, with its bias trained. Source: Park et al. (2024), arXiv:2408.01099, section 3.2.

    The ranks are `rank: {contribution: …}`'s, or any others. Norms and scales, which the authors train too, stay frozen here.
    """
    base, initial = place.started()
    bias = place.bias
    if bias is not None and options.train_bias:
        bias = nn.Parameter(bias.detach().clone())
    made = place.scaled(place.product(initial.B, initial.A))
    return Sum(base, made, bias=bias, names=("base", "adapter"))
