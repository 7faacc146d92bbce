"""Labels of the indices of a value's dimensions, and the ledger of which labels are cut together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.int64]
Slot = tuple[str, str, str]  # `site`, name, `out` or `in`; `tensor`, name, dimension; `value`, node, dimension
FIXED = 0


@dataclass(frozen=True)
class Part:
    """The labels of some dimensions of a value together. dims: rising; drawn: stored nowhere.

    labels: of their sizes, but along a dimension whose size is not known (heads within the batch) those of one period.
    """

    dims: tuple[int, ...]
    labels: Array
    drawn: bool = False


@dataclass(frozen=True)
class Axes:
    """A value's sizes and the parts that its labelled dimensions form; every dimension is in one of them at most.

    A dimension in none cannot be cut; one of size 1 meets every size.
    """

    shape: tuple[Any, ...]
    parts: tuple[Part, ...] = ()

    def part(self, dim: int) -> Part | None:
        """Return the part that a dimension is in."""
        return next((part for part in self.parts if dim in part.dims), None)

    def without(self, dims: Sequence[int]) -> "tuple[Part, ...]":
        """Return the parts that have none of some dimensions."""
        return tuple(part for part in self.parts if not set(part.dims) & set(dims))

    def wide(self, dim: int) -> bool:
        """Say whether a dimension may have several indices."""
        size = self.shape[dim]
        return not (isinstance(size, int) and size == 1)


class Ledger:
    """The labels that were given out and what was found out about them.

    slots: the labels of everything stored, by its name. joints: arrays of labels along several dimensions. heads: labels that
    were seen as the heads of an attention.
    """

    def __init__(self) -> None:
        self.count = 1
        self.slots: dict[Slot, Array] = {}
        self.pairs: list[tuple[Array, Array]] = []
        self.reasons: list[tuple[Array, str, bool]] = []
        self.joints: list[Array] = []
        self.heads: list[Array] = []

    def of(self, slot: Slot, size: int) -> Array:
        """Return the labels of a slot, new ones the first time."""
        if slot not in self.slots:
            self.slots[slot] = np.arange(self.count, self.count + size, dtype=np.int64)
            self.count += size
        return self.slots[slot]

    def tie(self, left: Array, right: Array) -> None:
        """Say that labels are cut together, place by place after broadcasting."""
        left, right = np.broadcast_arrays(left, right)
        self.pairs.append((left.ravel(), right.ravel()))

    def fix(self, labels: Array, reason: str, *, weak: bool = False) -> None:
        """Say that labels cannot be cut."""
        flat = np.unique(labels)
        self.pairs.append((flat, np.zeros_like(flat)))
        self.reasons.append((flat, reason, weak))

    def joined(self, dims: Sequence[int], labels: Array, *, drawn: bool = False) -> Part | None:
        """Return the part of some dimensions in any order; those along which nothing changes are left out, and empty ones."""
        if not labels.size:
            return None
        order = np.argsort(dims)
        labels = labels.transpose(order)
        kept = []
        for axis, place in enumerate(order):
            if labels.shape[axis] == 1 or bool((labels == labels.take([0], axis)).all()):
                labels = labels.take([0], axis)
            else:
                kept.append((axis, dims[place]))
        if not kept:
            self.fix(labels, "there is one index of it")
            return None
        labels = labels.reshape([labels.shape[axis] for axis, _ in kept])
        if labels.ndim > 1:
            self.joints.append(labels)
        return Part(tuple(dim for _, dim in kept), labels, drawn)

    def collapse(self, part: Part, dim: int, reason: str, *, weak: bool = False) -> Part | None:
        """Tie what differs along a dimension alone; with no other dimension nothing of the part can be cut."""
        axis = part.dims.index(dim)
        if len(part.dims) == 1:
            self.fix(part.labels, reason, weak=weak)
            return None
        self.tie(part.labels, part.labels.take([0], axis))
        first: Array = part.labels[(slice(None),) * axis + (0,)]
        return Part(part.dims[:axis] + part.dims[axis + 1 :], first, part.drawn)

    def collapsed(self, axes: Axes, dims: Sequence[int], reason: str, *, weak: bool = False) -> Axes:
        """Return a value none of whose `dims` can be cut alone."""
        parts = []
        for part in axes.parts:
            left: Part | None = part
            for dim in set(part.dims) & set(dims):
                left = left and self.collapse(left, dim, reason, weak=weak)
            parts += [left] if left else []
        return Axes(axes.shape, tuple(parts))

    def fixed(self, axes: Axes, reason: str) -> None:
        """Say that nothing of a value can be cut."""
        for part in axes.parts:
            self.fix(part.labels, reason)

    def along(self, axes: Axes, dim: int, reason: str) -> tuple[Axes, Array | None]:
        """Return the labels that a dimension has by itself, or None, and the value without what other dimensions had to do."""
        part = axes.part(dim)
        if part is None:
            return axes, None
        if len(part.dims) > 1:
            return self.collapsed(axes, [dim], reason), None
        return axes, part.labels


def meet(ledger: Ledger, values: Sequence[Axes], shape: tuple[Any, ...], reason: str) -> Axes:
    """Return what values give that meet entry by entry; labels of the same places are tied."""
    lifted = [Axes((1,) * (len(shape) - len(v.shape)) + v.shape, _shifted(v, len(shape) - len(v.shape))) for v in values]
    while (clash := _clash(lifted)) is not None:
        place, dim = clash
        lifted[place] = ledger.collapsed(lifted[place], [dim], reason, weak=True)
    parts: dict[tuple[int, ...], Part] = {}
    for value in lifted:
        for part in value.parts:
            first = parts.setdefault(part.dims, part)
            if first is not part:
                if first.labels.shape != part.labels.shape:  # periods of their own
                    ledger.fix(first.labels, reason)
                    ledger.fix(part.labels, reason)
                    continue
                ledger.tie(first.labels, part.labels)
                if first.drawn and not part.drawn:
                    parts[part.dims] = part
    return Axes(shape, tuple(parts.values()))


def _shifted(value: Axes, by: int) -> tuple[Part, ...]:
    return tuple(Part(tuple(dim + by for dim in part.dims), part.labels, part.drawn) for part in value.parts)


def _clash(values: Sequence[Axes]) -> tuple[int, int] | None:
    """Return a value and a dimension of it along which another value cannot follow, if there is one.

    Of several dimensions that differ the first is kept: heads go whole, whatever turns their features.
    """
    for place, part, other in _pairs(values):
        for dim in part.dims:
            if not other.wide(dim):
                continue
            there = other.part(dim)
            if there is None:
                return place, dim
            if there.dims != part.dims:
                first = min(*part.dims, *there.dims)
                for odd in part.dims:
                    if odd != first:
                        return place, odd
    return None


def _pairs(values: Sequence[Axes]) -> Iterator[tuple[int, Part, Axes]]:
    for place, value in enumerate(values):
        for part in value.parts:
            for j, other in enumerate(values):
                if j != place:
                    yield place, part, other


def reshaped(ledger: Ledger, value: Axes, shape: tuple[Any, ...], reason: str) -> Axes:
    """Return a value whose entries are told by other dimensions, in the same order."""
    blocks = matched(value.shape, shape)
    parts: list[Part] = []
    taken: dict[int, Part] = {}
    for part in sorted(value.parts, key=lambda part: part.drawn):
        touched = [i for i, (before, _) in enumerate(blocks) if set(before) & set(part.dims)]
        before = [dim for i in touched for dim in blocks[i][0]]
        after = [dim for i in touched for dim in blocks[i][1]]
        clash = next((taken[i] for i in touched if i in taken), None)
        whole = all(isinstance(size, int) for size in [value.shape[d] for d in before] + [shape[d] for d in after])
        repeated = None if clash is not None or whole else periodic(value, shape, part, before, after)
        if repeated is not None:
            taken |= dict.fromkeys(touched, part)
            made = ledger.joined(*repeated, drawn=part.drawn)
            parts += [made] if made else []
            continue
        if clash is not None or not whole:
            ledger.fix(part.labels, reason)
            if clash is not None and not part.drawn:
                ledger.fix(clash.labels, reason)
            continue
        taken |= dict.fromkeys(touched, part)
        sizes = [value.shape[dim] for dim in before]
        spread = part.labels.reshape([value.shape[dim] if dim in part.dims else 1 for dim in before])
        made = ledger.joined(after, np.broadcast_to(spread, sizes).reshape([shape[dim] for dim in after]), drawn=part.drawn)
        parts += [made] if made else []
    return Axes(shape, tuple(parts))


def periodic(
    value: Axes, shape: tuple[Any, ...], part: Part, before: Sequence[int], after: Sequence[int]
) -> tuple[list[int], Array] | None:
    """Return dimensions of a view and the labels along them, where what repeats is a part's labels, or None.

    before, after: the dimensions that hold the part, of the value and of the view, some of sizes that are not known. From the
    part's first dimension on the value has labels that repeat along what is in front of it: so has the view.
    """
    first = before.index(part.dims[0])
    inner = [value.shape[dim] for dim in before[first + 1 :]]
    if not all(isinstance(size, int) for size in inner):
        return None
    lengths = [part.labels.shape[part.dims.index(dim)] if dim in part.dims else 1 for dim in before[first:]]
    labels = np.broadcast_to(part.labels.reshape(lengths), [lengths[0], *inner])
    left, dims, sizes = labels.size, list[int](), list[int]()
    for dim in reversed(after):
        size = shape[dim]
        if left > 1 and not isinstance(size, int):
            size = left if int(_size(size).as_coeff_Mul()[0]) % left == 0 else 0
        if left == 1 or not size or left % size:
            break
        left //= size
        dims.append(dim)
        sizes.append(size)
    return (dims[::-1], labels.reshape(sizes[::-1])) if left == 1 else None


def matched(before: Sequence[Any], after: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
    """Return the smallest runs of dimensions that hold the same number of entries before and after a view."""
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        ins: list[int] = []
        outs: list[int] = []
        left: Any = 1
        right: Any = 1
        while not (ins or outs) or not _equal(left, right):
            behind = _about(left) < _about(right) or not ins
            if (behind and i < len(before)) or j == len(after):
                if i == len(before):
                    break
                left, i = left * _size(before[i]), i + 1
                ins.append(i - 1)
            else:
                right, j = right * _size(after[j]), j + 1
                outs.append(j - 1)
        blocks.append((ins, outs))
    return blocks


def _size(size: Any) -> Any:
    """Return a size as an int or as torch's expression of it."""
    return size if isinstance(size, int) else size.node.expr


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    difference = left - right
    return bool(difference == 0 or difference.expand() == 0)


def _about(size: Any) -> float:
    """Return a number for a size: all that are not known are taken for one large number."""
    return float(size if isinstance(size, int) else size.subs(dict.fromkeys(size.free_symbols, 1009)))
