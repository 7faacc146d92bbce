"""The rules of `lrc.maps.simplify` that leave out what does nothing."""

from typing import Any

from torch import Tensor

from lrc.maps.base import LinearMap, Slot, slot_shape
from lrc.maps.blocks import Blocks
from lrc.maps.composites import Chain, Scale, Sum
from lrc.maps.conv import Conv
from lrc.maps.dropout import Dropout
from lrc.maps.fold import pointwise
from lrc.maps.gate import Gate
from lrc.maps.leaves import Dense, Permutation
from lrc.maps.lookup import Lookup
from lrc.maps.small import Identity


def drop_identity(made: LinearMap) -> LinearMap | None:
    """Leave out of a chain what changes nothing once training is over: an order that is none, an identity, a dropout."""
    if not isinstance(made, Chain) or len(made.slots) < 2:
        return None
    kept = [slot for slot in made.slots if not _changes_nothing(slot)]
    if len(kept) == len(made.slots):
        return None
    return Chain(*(kept or made.slots[:1]), bias=made.bias)


def _changes_nothing(slot: Slot) -> bool:
    return (isinstance(slot, Identity | Dropout) and slot.bias is None) or (
        isinstance(slot, Permutation) and slot.is_identity()
    )


def join_blocks(made: LinearMap) -> LinearMap | None:
    """Blocks(first, second) -> one matrix."""
    return Dense(made.matrix().detach(), made.bias) if isinstance(made, Blocks) else None


def drop_closed_gates(made: LinearMap) -> LinearMap | None:
    """Chain(B, Gate, A) -> the same over the components whose gate is not exactly zero, and none where all are."""
    if not isinstance(made, Chain):
        return None
    for i in range(1, len(made.slots) - 1):
        left, gate, right = made.slots[i - 1 : i + 2]
        if not isinstance(gate, Gate) or gate.bias is not None or len(gate.open) == gate.in_features:
            continue
        if not (holds_numbers(left) and pointwise(left) and holds_numbers(right)):
            continue
        smaller = Gate(gate.diagonal.detach()[gate.open], spatial=gate.spatial)
        parts = [_columns(left, gate.open), smaller, _rows(right, gate.open)]
        return Chain(*made.slots[: i - 1], *parts, *made.slots[i + 2 :], bias=made.bias)
    return None


def _columns(slot: Any, kept: Tensor) -> Tensor | LinearMap:
    if isinstance(slot, Conv):
        return Conv(slot.weight.detach()[:, kept], slot.geometry, slot.bias)
    return slot.detach()[:, kept] if not isinstance(slot, Dense) else Dense(slot.weight.detach()[:, kept], slot.bias)


def _rows(slot: Any, kept: Tensor) -> Tensor | LinearMap:
    if not isinstance(slot, LinearMap):
        return slot.detach()[kept]  # type: ignore[no-any-return]
    assert isinstance(slot, Conv | Lookup | Dense)
    bias = None if slot.bias is None else slot.bias.detach()[kept]
    if isinstance(slot, Conv):
        return Conv(slot.weight.detach()[kept], slot.geometry, bias)
    if isinstance(slot, Lookup):
        return Lookup(slot.table.detach()[:, kept], slot.padding_index, bias)
    return Dense(slot.weight.detach()[kept], bias)


def drop_empty_terms(made: LinearMap) -> LinearMap | None:
    """Leave out of a sum the products of rank 0."""
    if not isinstance(made, Sum):
        return None
    kept = [slot for slot in made.slots if not _is_empty(slot)]
    if len(kept) == len(made.slots) or not kept:
        return None
    return Sum(*kept, bias=made.bias)


def _is_empty(slot: Slot) -> bool:
    if isinstance(slot, Scale):
        return slot.bias is None and _is_empty(slot.slots[0])
    rank_zero = isinstance(slot, Chain) and any(slot_shape(part)[0] == 0 for part in slot.slots[1:])
    return rank_zero and not inner_bias(slot)  # type: ignore[arg-type]  # a chain


def holds_numbers(slot: Slot) -> bool:
    """Return whether a part is one matrix, kernel or table."""
    return not isinstance(slot, LinearMap) or isinstance(slot, Dense | Conv | Lookup)


def inner_bias(made: LinearMap) -> bool:
    """Return whether a bias stands anywhere in a map."""
    return any(name.endswith("bias") for name, _ in made.named_parameters())
