"""The same map without some of its inputs or outputs: rows and columns are taken away, nothing is approximated."""

from dataclasses import replace

from torch import Tensor, nn

from lrc.maps.base import LinearMap, Slot
from lrc.maps.composites import Chain, Composite, Scale, Sum
from lrc.maps.conv import Conv, ConvChain
from lrc.maps.dropout import Dropout
from lrc.maps.leaves import Dense, Diagonal
from lrc.maps.lookup import Lookup
from lrc.maps.pivoted import Pivoted
from lrc.maps.row_norm import RowNorm
from lrc.maps.simplify import rebuilt


def keep_outputs(made: LinearMap, index: Tensor, groups: int | None = None) -> LinearMap | None:
    """Return the map whose output is `made(x)[..., index]`, or None for a map that cannot leave outputs out.

    index: (kept,), int64, rising. groups: how many a convolution has afterwards, where that changes (one a channel).
    """
    bias = None if made.bias is None else taken(made.bias, index)
    if isinstance(made, Dense):
        return Dense(taken(made.weight, index), bias)
    if isinstance(made, Conv):
        geometry = made.geometry if groups is None else replace(made.geometry, groups=groups)
        return Conv(taken(made.weight, index), geometry, bias)
    if groups is not None:
        return None
    if isinstance(made, ConvChain) and made.groups == 1 and made.geometries[0].groups == 1:
        first, *others = made.kernels
        return ConvChain([taken(first, index), *others], made.geometries, bias)
    if isinstance(made, Lookup):
        return Lookup(taken(made.table, index, 1), made.padding_index, bias)
    if isinstance(made, Diagonal):
        return type(made)(taken(made.diagonal, index), bias, made.dims)
    if isinstance(made, Dropout):
        return Dropout(len(index), made.p, made.dtype)
    if isinstance(made, Pivoted) and made.side == "in":
        return Pivoted(taken(made.P, index), made.Z, made.index, "in", bias)
    if not isinstance(made, Composite):
        return None
    slots = list(made.slots)
    places = chained(slots) if isinstance(made, Chain) else range(len(slots))
    for place in places if isinstance(made, Chain | Sum | Scale | RowNorm) else ():
        new = _slot_outputs(slots[place], index)
        if new is None:
            return None
        slots[place] = new
    if isinstance(made, RowNorm):
        return RowNorm(slots[0], taken(made.magnitude, index), bias, made.names)
    return _with_bias(rebuilt(made, slots), bias) if isinstance(made, Chain | Sum | Scale) else None


def keep_inputs(made: LinearMap, index: Tensor) -> LinearMap | None:
    """Return the map that gives `made(x)` for an input of zeros beside `x[..., index]`, or None for one that cannot.

    index: (kept,), int64, rising; of a convolution, channels of one group.
    """
    if isinstance(made, Dense):
        return Dense(taken(made.weight, index, 1), made.bias)
    if isinstance(made, Conv):
        return Conv(taken(made.weight, index, 1), made.geometry, made.bias)
    if isinstance(made, ConvChain) and made.geometries[-1].groups == 1:
        *others, last = made.kernels
        return ConvChain([*others, taken(last, index, 1)], made.geometries, made.bias)
    if isinstance(made, Diagonal) and made.bias is None:
        return type(made)(taken(made.diagonal, index), None, made.dims)
    if isinstance(made, Dropout):
        return Dropout(len(index), made.p, made.dtype)
    if isinstance(made, Pivoted) and made.side == "out":
        return Pivoted(taken(made.P, index, 1), made.Z, made.index, "out", made.bias)
    if not isinstance(made, Chain | Sum | Scale):
        return None  # of what has lengths of rows, too: they are those of whole rows
    slots = list(made.slots)
    places = chained(slots[::-1]) if isinstance(made, Chain) else range(len(slots))
    for place in places:
        place = len(slots) - 1 - place if isinstance(made, Chain) else place
        new = _slot_inputs(slots[place], index)
        if new is None:
            return None
        slots[place] = new
    return rebuilt(made, slots)


def chained(slots: list[Slot]) -> range:
    """Return the places of the parts of a chain that are cut: those that act on every feature alone, and the first other."""
    alone = 0
    while alone < len(slots) - 1 and isinstance(slots[alone], Diagonal | Dropout):
        alone += 1
    return range(alone + 1)


def taken(tensor: Tensor, index: Tensor, dim: int = 0) -> nn.Parameter:
    """Return some entries along a dimension as a parameter of its own memory, trained where the tensor is."""
    index = index.to(tensor.device)
    return nn.Parameter(tensor.detach().index_select(dim, index), requires_grad=tensor.requires_grad)


def _slot_outputs(slot: Slot, index: Tensor) -> Slot | None:
    return keep_outputs(slot, index) if isinstance(slot, LinearMap) else taken(slot, index)


def _slot_inputs(slot: Slot, index: Tensor) -> Slot | None:
    return keep_inputs(slot, index) if isinstance(slot, LinearMap) else taken(slot, index, 1)


def _with_bias(made: LinearMap, bias: Tensor | None) -> LinearMap:
    """Return a new map with a bias of its own size."""
    made.register_parameter("bias", bias if isinstance(bias, nn.Parameter) else None)
    return made
