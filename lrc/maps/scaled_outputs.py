"""The outputs of a map scaled and shifted feature by feature: what a batch norm after it does."""

from torch import Tensor

from lrc.maps.base import LinearMap, Slot, exact_bias
from lrc.maps.composites import Chain
from lrc.maps.conv import Conv, ConvChain
from lrc.maps.leaves import Dense


def scale_outputs(made: LinearMap, scale: Tensor, shift: Tensor) -> LinearMap | None:
    """Return the map x -> scale * made(x) + shift, or None for a map that cannot take it at no cost.

    scale, shift: (out_features,). The numbers that are applied last are scaled, in float64, and all others shared.
    """
    scale, shift = scale.detach().double(), shift.detach().double()
    old = exact_bias(made.bias)
    bias = (shift if old is None else scale * old + shift).to(made.dtype)
    if isinstance(made, Dense):
        return Dense(_scaled(made.weight, scale), bias)
    if isinstance(made, Conv):
        return Conv(_scaled(made.weight, scale), made.geometry, bias)
    if isinstance(made, ConvChain):
        last, *others = made.kernels
        return ConvChain([_scaled(last, scale), *others], made.geometries, bias)
    if isinstance(made, Chain) and not isinstance(made.slots[0], LinearMap):
        others_: list[Slot] = list(made.slots[1:])
        return Chain(_scaled(made.slots[0], scale), *others_, bias=bias, names=made.names)
    return None


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    """Return a weight (out_features, …) with its rows scaled."""
    return (weight.detach().double() * scale.view(-1, *[1] * (weight.ndim - 1))).to(weight.dtype)
