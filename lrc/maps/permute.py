"""The same map with its inputs or outputs in another order, without a permutation of its own where that is possible."""

import torch
from torch import Tensor

from lrc.maps.base import LinearMap, Slot
from lrc.maps.composites import Chain, Sum
from lrc.maps.leaves import Dense
from lrc.maps.pivoted import Pivoted


def permute_outputs(made: LinearMap, order: Tensor) -> LinearMap | None:
    """Return the map whose output is `made(x)[..., order]`, or None for a map that cannot take an order in.

    order: (out_features,), int64. A pivoted map whose order becomes 0, 1, 2, … loses its index.
    """
    bias = None if made.bias is None else made.bias.detach()[order]
    if isinstance(made, Dense):
        return Dense(made.weight.detach()[order], bias)
    if isinstance(made, Pivoted) and made.side == "out":
        index = order if made.index is None else made.index.long()[order]
        return Pivoted(made.P, made.Z, _unless_identity(index), "out", bias)
    if isinstance(made, Pivoted):
        return Pivoted(made.P.detach()[order], made.Z, made.index, "in", bias)
    if isinstance(made, Chain):
        first = _slot_outputs(made.slots[0], order)
        return None if first is None else Chain(first, *made.slots[1:], bias=bias, names=made.names)
    if isinstance(made, Sum):
        terms = [_slot_outputs(slot, order) for slot in made.slots]
        return None if any(t is None for t in terms) else Sum(*terms, bias=bias, names=made.names)  # type: ignore[arg-type]
    return None


def permute_inputs(made: LinearMap, order: Tensor) -> LinearMap | None:
    """Return the map that gives `made(x)` for the input `x[..., order]`, or None for a map that cannot take an order in.

    order: (in_features,), int64.
    """
    if isinstance(made, Dense):
        return Dense(made.weight.detach()[:, order], made.bias)
    if isinstance(made, Pivoted) and made.side == "out":
        return Pivoted(made.P.detach()[:, order], made.Z, made.index, "out", made.bias)
    if isinstance(made, Pivoted):
        back = order.argsort()
        index = back if made.index is None else back[made.index.long()]
        return Pivoted(made.P, made.Z, _unless_identity(index), "in", made.bias)
    if isinstance(made, Chain):
        last = _slot_inputs(made.slots[-1], order)
        return None if last is None else Chain(*made.slots[:-1], last, bias=made.bias, names=made.names)
    if isinstance(made, Sum):
        terms = [_slot_inputs(slot, order) for slot in made.slots]
        return None if any(t is None for t in terms) else Sum(*terms, bias=made.bias, names=made.names)  # type: ignore[arg-type]
    return None


def _slot_outputs(slot: Slot, order: Tensor) -> Tensor | LinearMap | None:
    return permute_outputs(slot, order) if isinstance(slot, LinearMap) else slot.detach()[order]


def _slot_inputs(slot: Slot, order: Tensor) -> Tensor | LinearMap | None:
    return permute_inputs(slot, order) if isinstance(slot, LinearMap) else slot.detach()[:, order]


def _unless_identity(index: Tensor) -> Tensor | None:
    return None if torch.equal(index, torch.arange(len(index), device=index.device)) else index
