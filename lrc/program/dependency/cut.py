"""The edit of a graph that loses units: rows and columns of maps, entries of tensors, and the sizes that nodes name."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lrc.errors import SiteError
from lrc.maps import LinearMap, Patches
from lrc.maps.kept import keep_inputs, keep_outputs, taken
from lrc.program.dependency.attributes import fit_modules
from lrc.program.dependency.flow import erase_unread
from lrc.program.dependency.groups import Groups
from lrc.program.dependency.labels import Array, Axes
from lrc.program.edits import put
from lrc.program.norms import module_of
from lrc.program.program import Program
from lrc.program.values import refresh_values

aten = torch.ops.aten
Alive = NDArray[np.bool_]
Edit = Callable[[fx.Node, "Sizes"], None]
EDITS: dict[Any, Edit] = {}


def cut_units(program: Program, groups: Groups, gone: Mapping[str, Array], by: str) -> list[str]:
    """Take units out of a program. gone: of every group by name, which units. by: the pass. Returns notes.

    What is left of a weight that no pass had touched can be trained, as what every pass makes, unless adapters are there to be
    trained in its place. Raises SiteError where what is left does not fit together: then a rule of the flow is wrong.
    """
    alive = living(groups, gone)
    ledger = groups.flow.ledger
    erase_unread(program)
    sizes = Sizes(alive, {node.name: value for node, value in groups.flow.values.items()})
    changed = sorted({slot[1] for slot, labels in ledger.slots.items() if slot[0] == "site" and not alive[labels].all()})
    order = [fqn for fqn in program.sites if fqn in changed]
    new = {fqn: cut_map(program, fqn, program.map_of(fqn), groups, alive) for fqn in order}
    for fqn in order if not program.frozen else ():
        if fqn not in program.maps:
            new[fqn].requires_grad_(True)
    program.raise_sites(order)
    for fqn in order:
        adapted = program.adapters.get(fqn)
        program.replace(fqn, new[fqn], by, settle=False, resize=True)
        if adapted is not None:
            program.adapters[fqn] = replace(adapted, initial=None)
        _set_groups(program, fqn)
    for slot, labels in ledger.slots.items():
        if slot[0] == "tensor" and not alive[labels].all():
            _cut_tensor(program, slot[1], int(slot[2]), torch.from_numpy(np.flatnonzero(alive[labels])))
    changes: dict[str, dict[int, int]] = {}
    edited = []
    for node in program.graph_module.graph.nodes:
        if node.op == "call_function" and node.target in EDITS and sizes.changed(node):
            before = numbers_in(node)
            EDITS[node.target](node, sizes)
            edited.append(node)
            changes.setdefault(module_of(node), {}).update(zip(before, numbers_in(node), strict=False))
    for group in groups.groups:  # numbers of units are sizes too, where the graph has them times another alone
        for own in (changes.get(fqn.rpartition(".")[0]) for fqn in group.sites if len(gone.get(group.name, ()))):
            if own is not None:
                own.setdefault(group.units, group.units - len(gone[group.name]))
    program.settle()
    try:
        refresh_values(program, edited)
    except Exception as error:  # torch raises many kinds
        raise SiteError(
            ", ".join(gone), message=f"the graph does not fit together without them: {str(error).splitlines()[0]}",
            hint="Name these sites under `ignore`, and report this model",
        ) from error  # fmt: skip
    note = fit_modules(program, {name: {a: b for a, b in own.items() if a != b} for name, own in changes.items()})
    return [] if note is None else [note]


def numbers_in(node: fx.Node) -> list[int]:
    """Return the numbers among a node's arguments, in order; of a split, the size of its first piece."""
    flat = [arg for arg in pytree.arg_tree_leaves(*node.args, **node.kwargs) if isinstance(arg, int)]
    return flat[:1] if node.target in (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default) else flat


def living(groups: Groups, gone: Mapping[str, Array]) -> Alive:
    """Return for every label whether it stays."""
    units = [groups.labels(group, gone[group.name]) for group in groups.groups if len(gone.get(group.name, ()))]
    return ~np.isin(groups.unit_of, np.concatenate(units)) if units else np.ones(len(groups.unit_of), bool)


def cut_map(program: Program, fqn: str, made: LinearMap, groups: Groups, alive: Alive) -> LinearMap:
    """Return a site's map without the rows and columns that go. A convolution of one channel a group loses groups."""
    slots, layout = groups.flow.ledger.slots, program.sites[fqn].layout
    out, read = slots.get(("site", fqn, "out")), slots.get(("site", fqn, "in"))
    new: LinearMap | None = made
    if out is not None and not alive[out].all():
        index = torch.from_numpy(np.flatnonzero(alive[out]))
        many = layout.groups * len(index) // len(out) if read is None and isinstance(layout, Patches) else None
        new = keep_outputs(made, index, many)
    if read is not None and not alive[read].all():
        new = new and keep_inputs(new, torch.from_numpy(np.flatnonzero(alive[read])))
    assert new is not None, "the flow has asked whether the map can be cut"
    return new


def _set_groups(program: Program, fqn: str) -> None:
    """Let a site's layout say how many groups its convolution has now."""
    site, made = program.sites[fqn], program.maps[fqn]
    geometry = getattr(made, "geometry", None)
    if isinstance(site.layout, Patches) and geometry is not None and geometry.groups != site.layout.groups:
        program.sites[fqn] = replace(site, layout=replace(site.layout, geometry=geometry))


def _cut_tensor(program: Program, name: str, dim: int, index: Tensor) -> None:
    """Put fewer entries of a stored tensor that no map holds in its place."""
    held: Any = program.graph_module
    for part in name.split("."):
        held = getattr(held, part)
    new = taken(held, index, dim)
    program.changed |= {name}
    put(program.graph_module, name, new if isinstance(held, nn.Parameter) else new.detach())


class Sizes:
    """How large values are with what stays. values: their labels, by the names of nodes."""

    def __init__(self, alive: Alive, values: Mapping[str, Any]) -> None:
        self.alive = alive
        self.values = values

    def changed(self, node: fx.Node) -> bool:
        """Say whether anything that a node reads or gives has fewer entries now."""
        given = [self.values.get(n.name) for n in (node, *node.all_input_nodes)]
        flat = [one for value in given for one in (value if isinstance(value, list) else [value])]
        return any(not self.alive[part.labels].all() for axes in flat if isinstance(axes, Axes) for part in axes.parts)

    def axes(self, node: Any) -> Axes:
        """Return the labels of a node's value."""
        found = self.values.get(node.name) if isinstance(node, fx.Node) else None
        return found if isinstance(found, Axes) else Axes(())

    def staying(self, axes: Axes, dim: int) -> Alive | None:
        """Return which indices of a dimension stay, or None where all do."""
        part = axes.part(dim)
        if part is None:
            return None
        others = tuple(i for i, d in enumerate(part.dims) if d != dim)
        return np.asarray(self.alive[part.labels].any(axis=others), bool)

    def size(self, axes: Axes, dim: int) -> Any:
        """Return the new size of a dimension."""
        kept = self.staying(axes, dim)
        return axes.shape[dim] if kept is None else int(kept.sum())


def edit(*targets: Any) -> Callable[[Edit], Edit]:
    """Let a function edit the calls of some operators."""

    def decorate(function: Edit) -> Edit:
        EDITS.update(dict.fromkeys(targets, function))
        return function

    return decorate


@edit(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default)
def _sizes(node: fx.Node, sizes: Sizes) -> None:
    axes = sizes.axes(node)
    asked: Any = node.args[1]
    new = [sizes.size(axes, dim) if isinstance(size, int) and size >= 0 else size for dim, size in enumerate(asked)]
    for dim, size in enumerate(asked):
        if isinstance(size, fx.Node) and (kept := sizes.staying(axes, dim)) is not None and not kept.all():
            new[dim] = -1  # heads within the batch: what is left of the entries
    node.args = (node.args[0], new, *node.args[2:])


@edit(aten.unflatten.int)
def _unflatten(node: fx.Node, sizes: Sizes) -> None:
    axes, before = sizes.axes(node), sizes.axes(node.args[0])
    asked: Any = node.args[2]
    dim = int(node.args[1]) % len(before.shape)  # type: ignore[arg-type]  # an int
    new = [sizes.size(axes, dim + i) if isinstance(size, int) and size >= 0 else size for i, size in enumerate(asked)]
    node.args = (node.args[0], node.args[1], new)


@edit(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def _squeeze(node: fx.Node, sizes: Sizes) -> None:
    """Name the dimensions that it drops, so that one of which a single index stays is not among them."""
    before = sizes.axes(node.args[0])
    named: Any = node.args[1] if len(node.args) > 1 else range(len(before.shape))
    dims = {dim % len(before.shape) for dim in ([named] if isinstance(named, int) else named)}
    node.target, node.args = aten.squeeze.dims, (node.args[0], [dim for dim in sorted(dims) if not before.wide(dim)])


@edit(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
def _split(node: fx.Node, sizes: Sizes) -> None:
    """Name the size of every piece: they need not be equal any more."""
    pieces, before = sizes.values[node.name], sizes.axes(node.args[0])
    given: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    dim = given % len(before.shape)
    node.target = aten.split_with_sizes.default
    node.args, node.kwargs = (node.args[0], [sizes.size(piece, dim) for piece in pieces], dim), {}


@edit(aten.group_norm.default)
def _group_norm(node: fx.Node, sizes: Sizes) -> None:
    kept = sizes.staying(sizes.axes(node.args[0]), 1)
    if kept is not None:
        many = int(node.args[1])  # type: ignore[arg-type]  # an int
        node.args = (node.args[0], many * int(kept.sum()) // len(kept), *node.args[2:])


@edit(aten.slice.Tensor)
def _slice(node: fx.Node, sizes: Sizes) -> None:
    before = sizes.axes(node.args[0])
    dim = int(node.args[1] if len(node.args) > 1 else 0) % len(before.shape)  # type: ignore[arg-type]  # an int
    kept = sizes.staying(before, dim)
    if kept is None:
        return
    bounds = [node.args[place] if len(node.args) > place else None for place in (2, 3)]
    start, stop, _ = slice(*bounds).indices(len(kept))
    node.args = (node.args[0], dim, int(kept[:start].sum()), int(kept[:stop].sum()), *node.args[4:])


@edit(aten.constant_pad_nd.default, aten.pad.default)
def _pad(node: fx.Node, sizes: Sizes) -> None:
    before, after = sizes.axes(node.args[0]), sizes.axes(node)
    widths: list[Any] = list(node.args[1])  # type: ignore[arg-type]  # a list
    for back in range(len(widths) // 2):
        dim = len(after.shape) - 1 - back
        kept, size = sizes.staying(after, dim), before.shape[dim]
        if kept is not None:
            first, last = int(widths[2 * back]), int(widths[2 * back]) + size
            widths[2 * back : 2 * back + 2] = [int(kept[:first].sum()), int(kept[last:].sum())]
    node.args = (node.args[0], widths, *node.args[2:])
