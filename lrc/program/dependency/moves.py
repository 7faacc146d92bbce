"""Rules of operators that move entries: views, orders, parts and joins of a value."""

import operator
from typing import Any

import numpy as np
import torch
from torch import fx

from lrc.program.dependency.flow import Flow, Value, rule
from lrc.program.dependency.labels import Axes, Part, meet, reshaped

aten = torch.ops.aten


@rule(
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default,
)  # fmt: skip
def view(flow: Flow, node: fx.Node) -> Value:
    """Tell the same entries, in the same order, by other dimensions."""
    return reshaped(flow.ledger, flow.axes(node.args[0]), flow.shape(node), f"a view ({flow.named(node)}) mixes it with others")


@rule(aten.transpose.int, aten.permute.default, aten.t.default, aten.numpy_T.default, aten.mT.default)
def order(flow: Flow, node: fx.Node) -> Value:
    """Change the order of dimensions."""
    value = flow.axes(node.args[0])
    rank = len(value.shape)
    places = list(range(rank))
    if node.target is aten.permute.default:
        places = [int(dim) % rank for dim in node.args[1]]  # type: ignore[union-attr, arg-type]  # a list
    elif rank > 1:
        pair = [int(dim) % rank for dim in node.args[1:]] if node.target is aten.transpose.int else [rank - 2, rank - 1]  # type: ignore[arg-type]
        places[pair[0]], places[pair[1]] = pair[1], pair[0]
    parts = [
        flow.ledger.joined([places.index(dim) for dim in part.dims], part.labels, drawn=part.drawn) for part in value.parts
    ]
    return Axes(flow.shape(node), tuple(part for part in parts if part))


@rule(aten.expand.default)
def expand(flow: Flow, node: fx.Node) -> Value:
    """Repeat along dimensions of one index: those may be cut, as whatever they meet is."""
    value, shape = flow.axes(node.args[0]), flow.shape(node)
    by = len(shape) - len(value.shape)
    parts = [Part(tuple(dim + by for dim in part.dims), part.labels, part.drawn) for part in value.parts]
    for dim, size in enumerate(shape):
        repeated = dim < by or not value.wide(dim - by)
        if repeated and isinstance(size, int) and size > 1:
            drawn = flow.ledger.joined((dim,), flow.ledger.of(("value", node.name, str(dim)), size), drawn=True)
            parts += [drawn] if drawn else []
    return Axes(shape, tuple(parts))


@rule(aten.repeat_interleave.self_int)
def repeat(flow: Flow, node: fx.Node) -> Value:
    """Repeat every index of a dimension."""
    value = flow.axes(node.args[0])
    given = flow.arguments(node, ["repeats", "dim"])
    if given["dim"] is None or not isinstance(given["repeats"], int):
        return unknown(flow, node)
    return along(flow, node, value, int(given["dim"]), lambda labels, axis: labels.repeat(given["repeats"], axis))


@rule(aten.slice.Tensor)
def cut_out(flow: Flow, node: fx.Node) -> Value:
    """Take a range of a dimension."""
    given = flow.arguments(node, ["self", "dim", "start", "end", "step"])
    bounds = [given["start"], given["end"], given["step"]]
    value, dim = flow.axes(given["self"]), given["dim"]
    if any(isinstance(bound, fx.Node) for bound in bounds) or given["step"] != 1 or not _several(node, dim):
        value = flow.ledger.collapsed(value, [dim % len(value.shape)], f"only some of it is read ({flow.named(node)})")
        return Axes(flow.shape(node), value.parts)
    picked = slice(*bounds)
    return along(flow, node, value, dim, lambda labels, axis: labels[(slice(None),) * axis + (picked,)])


def _several(node: fx.Node, dim: int) -> bool:
    """Say whether a range holds more than one index."""
    return bool(node.meta["val"].shape[dim] != 1) if isinstance(node.meta["val"].shape[dim], int) else True


@rule(aten.flip.default)
def flip(flow: Flow, node: fx.Node) -> Value:
    """Turn dimensions round."""
    made: Value = flow.axes(node.args[0])
    for dim in node.args[1]:  # type: ignore[union-attr]  # a list
        made = along(flow, node, made, int(dim), lambda labels, axis: np.flip(labels, axis))  # type: ignore[arg-type]
    return made


@rule(aten.select.int)
def select(flow: Flow, node: fx.Node) -> Value:
    """Take one index of a dimension."""
    value = flow.axes(node.args[0])
    dim = int(node.args[1])  # type: ignore[arg-type]  # an int
    return selected(flow, node, value, dim % len(value.shape), flow.shape(node))


def selected(flow: Flow, node: fx.Node, value: Axes, dim: int, shape: tuple[Any, ...]) -> Axes:
    """Return a value at one index of a dimension, which may not be cut by itself."""
    value = flow.ledger.collapsed(value, [dim], f"one index of it is read alone ({flow.named(node)})")
    parts = [Part(tuple(d - (d > dim) for d in part.dims), part.labels, part.drawn) for part in value.parts]
    return Axes(shape, tuple(parts))


@rule(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int)
def split(flow: Flow, node: fx.Node) -> Value:
    """Take a value apart along a dimension."""
    given = flow.arguments(node, ["self", "dim"])
    value, parts = flow.axes(given["self"]), []
    dim = int(given["dim"]) % len(value.shape)
    start = 0
    for piece in node.meta["val"]:
        shape = tuple(piece.shape)
        if node.target is aten.unbind.int:
            parts.append(selected(flow, node, value, dim, shape))
            continue
        size = shape[dim]
        if not isinstance(size, int):
            return unknown(flow, node)
        stop = start + size
        parts.append(
            along(flow, node, value, dim, lambda labels, axis, a=start, b=stop: labels[(slice(None),) * axis + (slice(a, b),)],
                  shape=shape)
        )  # fmt: skip
        start = stop
    return parts


@rule(operator.getitem)
def item(flow: Flow, node: fx.Node) -> Value:
    """Take one of several values."""
    values, place = flow.values.get(node.args[0]), node.args[1]  # type: ignore[arg-type]  # a node
    return values[place] if isinstance(values, list) and isinstance(place, int) else flow.plain(node)


@rule(aten.cat.default)
def join(flow: Flow, node: fx.Node) -> Value:
    """Put values behind one another along a dimension."""
    values = [flow.axes(read) for read in node.args[0]]  # type: ignore[union-attr]  # a list
    shape = flow.shape(node)
    dim = int(flow.arguments(node, ["dim"])["dim"]) % len(shape)
    return joined_along(flow, node, values, dim, shape)


@rule(aten.stack.default)
def stack(flow: Flow, node: fx.Node) -> Value:
    """Put values beside one another along a new dimension."""
    shape = flow.shape(node)
    dim = int(flow.arguments(node, ["dim"])["dim"]) % len(shape)
    one = (*shape[:dim], 1, *shape[dim + 1 :])
    values = [reshaped(flow.ledger, flow.axes(read), one, f"{flow.named(node)} stacks it") for read in node.args[0]]  # type: ignore[union-attr]
    return joined_along(flow, node, values, dim, shape)


def joined_along(flow: Flow, node: fx.Node, values: list[Axes], dim: int, shape: tuple[Any, ...]) -> Axes:
    """Return values behind one another along `dim`; in all other dimensions they are cut together. Empty ones add nothing."""
    values = [value for value in values if not (isinstance(value.shape[dim], int) and value.shape[dim] == 0)]
    ledger, reason = flow.ledger, f"{flow.named(node)} joins it to what cannot be cut"
    if not all(isinstance(value.shape[dim], int) for value in values):
        values = [ledger.collapsed(value, [dim], reason) for value in values]
    kinds = {part.dims for value in values if (part := value.part(dim)) is not None}
    alike = len(kinds) == 1 and all(value.part(dim) is not None for value in values)
    others = next(iter(kinds)) if alike else (dim,)
    if not alike:  # by itself each of them may still be cut along the dimension, but not along two at once
        values = [ledger.collapsed(value, _jointly(value, dim), reason) for value in values]
    sizes = [value.shape[dim] for value in values]
    part = None
    if all(isinstance(size, int) for size in sizes) and any(value.part(dim) is not None for value in values):
        arrays = []
        for value, size in zip(values, sizes, strict=True):
            own = value.part(dim)
            arrays.append(np.zeros([size], np.int64) if own is None else own.labels)
        part = ledger.joined(others, np.concatenate(arrays, others.index(dim)))
    rest = [Axes((*v.shape[:dim], 1, *v.shape[dim + 1 :]), tuple(p for p in v.parts if dim not in p.dims)) for v in values]
    met = meet(ledger, rest, (*shape[:dim], 1, *shape[dim + 1 :]), reason)
    return Axes(shape, (*met.parts, *([part] if part else [])))


def _jointly(value: Axes, dim: int) -> list[int]:
    part = value.part(dim)
    return [dim] if part is not None and len(part.dims) > 1 else []


@rule(aten.constant_pad_nd.default, aten.pad.default)
def pad(flow: Flow, node: fx.Node) -> Value:
    """Put entries around a value: constants along a labelled dimension may be cut, as whatever they meet is."""
    constant = node.target is aten.constant_pad_nd.default or flow.arguments(node, ["mode"])["mode"] == "constant"
    value, shape = flow.axes(node.args[0]), flow.shape(node)
    widths: list[Any] = list(node.args[1])  # type: ignore[arg-type]  # a list
    ledger = flow.ledger
    for back in range(len(widths) // 2):
        dim = len(shape) - 1 - back
        before, after = widths[2 * back], widths[2 * back + 1]
        part = value.part(dim)
        if part is None or (before, after) == (0, 0):
            continue
        if (
            not constant
            or len(part.dims) > 1
            or not isinstance(value.shape[dim], int)
            or not isinstance(before, int)
            or not isinstance(after, int)
            or min(before, after) < 0
        ):
            value = ledger.collapsed(value, [dim], f"{flow.named(node)} pads it")
            continue
        around = ledger.of(("value", node.name, str(dim)), before + after)
        made = ledger.joined((dim,), np.concatenate([around[:before], part.labels, around[before:]]))
        value = Axes(value.shape, (*value.without([dim]), *([made] if made else [])))
    return Axes(shape, value.parts)


def along(flow: Flow, node: fx.Node, value: Axes, dim: int, move: Any, shape: tuple[Any, ...] | None = None) -> Axes:
    """Return a value whose labels along a dimension are moved, by `move(labels, axis)`."""
    dim %= len(value.shape)
    if not isinstance(value.shape[dim], int):
        value = flow.ledger.collapsed(value, [dim], f"{flow.named(node)} moves it along a size that is not known")
    parts = []
    for part in value.parts:
        if dim not in part.dims:
            parts.append(part)
            continue
        made = flow.ledger.joined(part.dims, move(part.labels, part.dims.index(dim)), drawn=part.drawn)
        parts += [made] if made else []
    return Axes(flow.shape(node) if shape is None else shape, tuple(parts))


def unknown(flow: Flow, node: fx.Node) -> Value:
    """Say that nothing of what a node reads can be cut."""
    flow.fix_inputs(node, f"{flow.named(node)} reads it in a way that has no rule")
    return flow.plain(node)
