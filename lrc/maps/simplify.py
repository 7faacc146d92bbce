"""Constant folding on maps: one table of rules, applied from the inside out until none fires.

Every rule returns an equal map that needs no more numbers and no more FLOPs, and a line that says what it did.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from lrc.maps.base import Affine, Cost, LinearMap, Slot, add, exact_bias, slot_cost, slot_exact, slot_shape
from lrc.maps.composites import Chain, Composite, Scale, Sum
from lrc.maps.conv import Conv, ConvChain
from lrc.maps.dropout import Dropout
from lrc.maps.leaves import Dense, Diagonal, Permutation
from lrc.maps.lookup import Lookup, lookup_of
from lrc.maps.row_norm import RowNorm


class Folded(NamedTuple):
    """An equal map and what was done to reach it."""

    map: LinearMap
    notes: tuple[str, ...]


Rule = Callable[[LinearMap], LinearMap | None]


def fold(made: LinearMap) -> LinearMap:
    """Return the one dense map, convolution or table that `made` stands for. Raises TypeError where it stands for none."""
    if isinstance(made, Dense | Conv | Lookup):
        return made
    if isinstance(made, ConvChain):
        return made.folded()
    weight, bias = made.dense()
    conv = conv_of(made)
    if conv is not None:
        return Conv(weight.reshape(conv.weight.shape), conv.geometry, bias)
    lookup = lookup_of(made)
    if lookup is not None:
        return Lookup(weight.T.contiguous(), lookup.padding_index, bias)
    return Dense(weight, bias)


def conv_of(made: LinearMap) -> Conv | None:
    """Return a convolution with the kernel size and geometry of what a map stands for, where that is a convolution."""
    first: object = made
    while isinstance(first, Composite):
        first = first.slots[0]
    return first.folded() if isinstance(first, ConvChain) else first if isinstance(first, Conv) else None


def simplify(made: LinearMap) -> Folded:
    """Return the smallest equal map that the rules reach. A map that no rule fits comes back as the same object."""
    whole = fold_adapters(made)
    if whole is not None:
        return Folded(whole, (f"fold adapters: {made!r} -> {whole!r}",))
    notes: list[str] = []
    while True:
        made, inside = simplify_parts(made)
        notes += inside
        for rule in RULES:
            smaller = rule(made)
            if smaller is not None:
                notes.append(f"{rule.__name__.replace('_', ' ')}: {made!r} -> {smaller!r}")
                made = smaller
                break
        else:
            return Folded(made, tuple(notes))


def simplify_parts(made: LinearMap) -> Folded:
    """Return the map over simplified parts."""
    parts = [simplify(slot) if isinstance(slot, LinearMap) else slot for slot in getattr(made, "slots", ())]
    notes = tuple(note for part in parts if isinstance(part, Folded) for note in part.notes)
    if not notes or not isinstance(made, Composite):
        return Folded(made, ())
    return Folded(rebuilt(made, [part.map if isinstance(part, Folded) else part for part in parts]), notes)


def rebuilt(made: Composite, parts: list[Slot]) -> LinearMap:
    """Return the same composite over other parts."""
    if isinstance(made, Scale):
        return Scale(parts[0], made.scale, made.bias, made.names)
    if isinstance(made, RowNorm):
        return RowNorm(parts[0], made.magnitude, made.bias, made.names)
    return type(made)(*parts, bias=made.bias, names=made.names)


def fold_adapters(made: LinearMap) -> LinearMap | None:
    """Sum(Dense, Scale(Chain)) and the like -> Dense: the whole sum at once, rounded once, where one of its terms is dense.

    The dense term makes what the sum stands for no larger. So for convolutions and embeddings, and inside a `RowNorm`.
    """
    if isinstance(made, RowNorm):
        inner = made.slots[0]
        dense = not isinstance(inner, LinearMap) or fold_adapters(inner) is not None or isinstance(inner, Dense | Conv | Lookup)
        return fold(made) if dense else None
    if not isinstance(made, Sum) or len(made.slots) < 2:
        return None
    dense = any(not isinstance(slot, LinearMap) or isinstance(slot, Dense | Conv | Lookup) for slot in made.slots)
    return fold(made) if dense and has_dense(made) else None


def has_dense(made: Slot) -> bool:
    """Say whether a map stands for one weight: whether every part of it has a dense form."""
    if not isinstance(made, LinearMap):
        return True
    return type(made).exact is not LinearMap.exact and all(has_dense(slot) for slot in getattr(made, "slots", ()))


def flatten_nested(made: LinearMap) -> LinearMap | None:
    """Chain(Chain(C, B), A) -> Chain(C, B, A), and the same for sums, where the inner one has no bias or is outermost."""
    if not isinstance(made, Chain | Sum):
        return None
    kind = type(made)
    for i, slot in enumerate(made.slots):
        if isinstance(slot, kind) and (slot.bias is None or kind is Sum or i == 0):
            bias = add(exact_bias(made.bias), exact_bias(slot.bias))
            flat = [*made.slots[:i], *slot.slots, *made.slots[i + 1 :]]
            return kind(*flat, bias=None if bias is None else bias.to(made.dtype))
    return None


def unwrap_single(made: LinearMap) -> LinearMap | None:
    """Chain(X) and Sum(X) -> X."""
    if not isinstance(made, Chain | Sum) or len(made.slots) != 1:
        return None
    slot = made.slots[0]
    if not isinstance(slot, LinearMap):
        return Dense(slot, made.bias)
    bias = add(exact_bias(slot.bias), exact_bias(made.bias))
    return slot.with_bias(None if bias is None else torch.nn.Parameter(bias.to(made.dtype)))


def absorb_scale(made: LinearMap) -> LinearMap | None:
    """Scale(s, X) -> X with the constant multiplied into its outermost numbers."""
    return None if not isinstance(made, Scale) else _scaled(made)


def _scaled(made: Scale) -> LinearMap | None:
    inner = made.slots[0]
    if isinstance(inner, Chain) and inner.bias is None and not isinstance(inner.slots[0], LinearMap):
        outer = (inner.slots[0].detach().double() * made.scale).to(made.dtype)
        return Chain(outer, *inner.slots[1:], bias=made.bias)
    if not isinstance(inner, LinearMap) or isinstance(inner, Dense):
        weight, bias = made.dense()
        return Dense(weight, bias)
    return None


def drop_identity(made: LinearMap) -> LinearMap | None:
    """Leave out a permutation in its own order, and a dropout, from a chain."""
    if not isinstance(made, Chain) or len(made.slots) < 2:
        return None
    kept = [slot for slot in made.slots if not _is_identity(slot)]
    if len(kept) == len(made.slots):
        return None
    return Chain(*(kept or made.slots[:1]), bias=made.bias)


def _is_identity(slot: Slot) -> bool:
    return isinstance(slot, Dropout) or (isinstance(slot, Permutation) and slot.is_identity())


def join_low_rank_terms(made: LinearMap) -> LinearMap | None:
    """Sum(Chain(B, A), Chain(D, C)) -> Chain([B D], [A; C]): one product of the summed rank."""
    if not isinstance(made, Sum):
        return None
    pairs = [slot.slots for slot in made.slots if isinstance(slot, Chain) and _is_pair(slot)]
    if len(pairs) < 2:
        return None
    B = torch.cat([slot_exact(left).weight for left, _ in pairs], 1).to(made.dtype)
    A = torch.cat([slot_exact(right).weight for _, right in pairs], 0).to(made.dtype)
    others = [slot for slot in made.slots if not _is_pair(slot)]
    return Sum(*others, Chain(B, A), bias=made.bias)


def _is_pair(slot: Slot) -> bool:
    return (
        isinstance(slot, Chain)
        and len(slot.slots) == 2
        and slot.bias is None
        and not any(isinstance(part, LinearMap) for part in slot.slots)
    )


def multiply_out(made: LinearMap) -> LinearMap | None:
    """Multiply two neighbours of a chain, or add two terms of a sum, where one matrix needs no more than both."""
    if not isinstance(made, Chain | Sum):
        return None
    slots = made.slots
    for i in range(len(slots) - 1):
        if not all(_foldable(slot) for slot in slots[i : i + 2]):
            continue
        rows, columns = slot_shape(slots[i])[0], slot_shape(slots[i + 1])[1]
        before = slot_cost(slots[i], 1) + slot_cost(slots[i + 1], 1)
        if not _no_larger(Cost(rows * columns, 0, 2 * rows * columns), before):
            continue
        joined = Dense(*_combined(made, slots[i], slots[i + 1]))
        if not _no_larger(joined.cost(1), before):  # an inner bias has become one of more numbers
            continue
        return type(made)(*slots[:i], joined, *slots[i + 2 :], bias=made.bias)
    return None


def _foldable(slot: Slot) -> bool:
    return not isinstance(slot, LinearMap) or isinstance(slot, Dense | Diagonal | Permutation | Chain)


def _no_larger(after: Cost, before: Cost) -> bool:
    return after.parameters <= before.parameters and after.flops <= before.flops


def _combined(made: LinearMap, left: Slot, right: Slot) -> Affine:
    """Return the product (of a chain) or the sum of two slots, in the map's dtype."""
    (W, b), (V, c) = slot_exact(left), slot_exact(right)
    if isinstance(made, Sum):
        weight, bias = W + V, add(b, c)
    else:
        weight, bias = W @ V, add(None if c is None else W @ c, b)
    return Affine(weight.to(made.dtype), None if bias is None else bias.to(made.dtype))


RULES: tuple[Rule, ...] = (
    fold_adapters,
    flatten_nested,
    unwrap_single,
    absorb_scale,
    drop_identity,
    join_low_rank_terms,
    multiply_out,
)
