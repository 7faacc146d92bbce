"""The one dense map, convolution or table that a map stands for."""

import math

from torch import Tensor

from lrc.maps.base import LinearMap
from lrc.maps.composites import Composite
from lrc.maps.conv import Conv, ConvChain, Geometry
from lrc.maps.experts import Experts
from lrc.maps.leaves import Dense
from lrc.maps.lookup import Lookup, lookup_of
from lrc.maps.segments import Segments
from lrc.maps.tucker import Tucker

Plain = Dense | Conv | Lookup


def fold(made: LinearMap) -> LinearMap:
    """Return the one dense map, convolution or table that `made` stands for.

    Raises TypeError where it stands for none, with the reason (`LinearMap.obstacle`).
    """
    if isinstance(made, Plain):
        return made
    if isinstance(made, ConvChain):
        return made.folded()
    if isinstance(made, Experts):
        return Experts([made.dense().weight.reshape(made.count, -1, made.in_features)], transposed=made.transposed)
    return alike(made, *made.dense())


def alike(made: LinearMap, weight: Tensor, bias: Tensor | None) -> LinearMap:
    """Return a weight (out_features, in_features) as what `made` is: a dense map, a convolution or a table."""
    lookup = lookup_of(made)
    if lookup is not None:
        return lookup.over(weight.T.contiguous(), bias)
    conv = window_of(made)
    return Dense(weight, bias) if conv is None else Conv(weight.reshape(weight.shape[0], *conv[0]), conv[1], bias)


def window_of(made: object) -> tuple[tuple[int, ...], Geometry] | None:
    """Return the kernel (in_channels / groups, *sizes) and the geometry of the convolution that a map is, if it is one.

    Of several in a row it is the one applied first; those after it are of size 1 x 1 (`pointwise`).
    """
    if isinstance(made, Conv):
        return tuple(made.weight.shape[1:]), made.geometry
    if isinstance(made, ConvChain):
        return window_of(made.folded())
    if isinstance(made, Tucker):
        return made.kernel, made.geometry
    if isinstance(made, Segments):
        return None if made.geometry is None else (made.kernel, made.geometry)
    slots = made.slots if isinstance(made, Composite) else ()
    found = (window_of(slot) for slot in reversed(slots))
    return next((window for window in found if window is not None), None)


def pointwise(made: object) -> bool:
    """Return whether a map sees one position at a time: no convolution, or one of size 1 x 1 that moves by one."""
    window = window_of(made)
    if window is None:
        return True
    (_, *sizes), geometry = window
    return math.prod(sizes) == 1 and geometry == Geometry.unit(len(sizes))
