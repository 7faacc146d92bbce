"""Constant folding on maps: one table of rules, applied from the inside out until none fires.

Every rule returns an equal map that needs no more numbers and no more FLOPs, and a line that says what it did.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lrc.maps.base import Affine, LinearMap, Slot, add, exact_bias, slot_cost, slot_exact, slot_shape
from lrc.maps.bottleneck import Bottleneck
from lrc.maps.codebook import Codebook
from lrc.maps.composites import Chain, Composite, Scale, Sum
from lrc.maps.conv import ConvChain
from lrc.maps.drop import drop_closed_gates, drop_empty_terms, drop_identity, holds_numbers, inner_bias, join_blocks
from lrc.maps.fold import alike, fold, pointwise
from lrc.maps.leaves import Dense
from lrc.maps.pivoted import Pivoted
from lrc.maps.quantized import Quantized
from lrc.maps.row_norm import RowNorm
from lrc.maps.sparse import Sparse


class Folded(NamedTuple):
    """An equal map and what was done to reach it."""

    map: LinearMap
    notes: tuple[str, ...]


Rule = Callable[[LinearMap], LinearMap | None]


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
    if isinstance(made, Bottleneck):
        return Bottleneck(parts[0], parts[1], made.activation, made.bias, made.names)
    if isinstance(made, RowNorm):
        return RowNorm(parts[0], made.magnitude, made.bias, made.names)
    return type(made)(*parts, bias=made.bias, names=made.names)


def fold_adapters(made: LinearMap) -> LinearMap | None:
    """Sum(Dense, Scale(Chain)) and the like -> Dense: the whole at once, rounded once, where a part is as large as the whole.

    So for convolutions and embeddings, inside a `RowNorm`, and for branches after a dense weight.
    """
    if not isinstance(made, Chain | Sum | RowNorm) or made.obstacle() is not None:
        return None
    if isinstance(made, Chain) and not (isinstance(made.slots[0], Sum) and pointwise(made.slots[0])):
        return None
    if len(made.slots) < 2 and not isinstance(made, RowNorm):
        return None
    if max((p.numel() for p in made.parameters()), default=0) < made.out_features * made.in_features:
        return None
    whole = fold(made)
    cost, least = made.cost(1), whole.cost(1)
    return whole if least.parameters <= cost.parameters and least.flops <= cost.flops else None


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
    if isinstance(inner, Chain) and inner.bias is None:
        at = next((i for i, slot in enumerate(inner.slots) if holds_numbers(slot)), None)
        if at is None or any(isinstance(slot, LinearMap) and inner_bias(slot) for slot in inner.slots[: at + 1]):
            return None
        slots = [*inner.slots[:at], _times(inner.slots[at], made.scale), *inner.slots[at + 1 :]]
        return Chain(*slots, bias=made.bias)
    if isinstance(inner, ConvChain) and inner.bias is None:
        outer, *others = inner.kernels
        return ConvChain([_times(outer, made.scale), *others], inner.geometries, made.bias)
    if holds_numbers(inner):
        return alike(made, *made.dense())
    return None


def _times(slot: Any, scale: float) -> Any:
    """Return a matrix, a kernel or a table times a constant, in its own dtype."""
    if isinstance(slot, LinearMap):
        weight, _ = slot.exact()
        return alike(slot, (scale * weight).to(slot.dtype), None)
    return (slot.detach().double() * scale).to(slot.dtype)


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
    """Multiply two neighbours of a chain, or add two terms of a sum, where one weight needs no more than both."""
    if not isinstance(made, Chain | Sum):
        return None
    slots = made.slots
    for i in range(len(slots) - 1):
        pair = slots[i : i + 2]
        if not all(_foldable(slot) for slot in pair) or (isinstance(made, Chain) and not pointwise(pair[0])):
            continue
        before = slot_cost(pair[0], 1) + slot_cost(pair[1], 1)
        rows, columns = slot_shape(pair[0])[0], slot_shape(pair[1])[1]
        if rows * columns > before.parameters:
            continue
        joined = alike(type(made)(*pair), *_combined(made, *pair))
        after = joined.cost(1)
        if after.parameters > before.parameters or after.flops > before.flops:  # an inner bias may have got more numbers
            continue
        return type(made)(*slots[:i], joined, *slots[i + 2 :], bias=made.bias)
    return None


def _foldable(slot: Slot) -> bool:
    return not isinstance(slot, LinearMap) or (
        slot.obstacle() is None and not isinstance(slot, Pivoted | Quantized | Sparse | Codebook)
    )


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
    join_blocks,
    drop_closed_gates,
    drop_empty_terms,
    join_low_rank_terms,
    multiply_out,
)
