"""Where in the graph the values are that calibration looks at: what a site reads, what it gives, which rows are padding."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lrc.errors import SiteError
from lrc.maps import Bags, Banks, Layout
from lrc.maps.bag import Entries
from lrc.program import Program, Site
from lrc.program.sites import Use

PIECE = 64 * 2**20  # bytes of patches that are held at a time


@dataclass(frozen=True)
class Tap:
    """One use of a site: the node that it reads and the node that it gives, and how both are rows.

    context: the other nodes that it reads, by the names that its layout gives them. shape: (out_features, in_features) of
    this use, the transposed ones of the site where a head's weight is looked up in.
    """

    fqn: str
    reads: fx.Node
    gives: fx.Node
    layout: Layout
    context: tuple[tuple[str, fx.Node], ...] = ()
    shape: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Piece:
    """Rows of what a site reads, (rows, in_features), and which rows of all that it gives they belong to.

    entries: in place of rows, those of sparse ones. owners: the expert of every row.
    """

    rows: Tensor
    place: slice
    entries: Entries | None = None
    owners: Tensor | None = None


def taps_of(program: Program, fqn: str) -> tuple[Tap, ...]:
    """Return the uses of a site, in graph order. Raises SiteError when the graph has no such site or never uses it."""
    site = program.sites.get(fqn)
    if site is None or not site.uses:
        raise SiteError(fqn, message="the captured graph has no site of this name")
    nodes = program.nodes
    order = {name: place for place, name in enumerate(nodes)}
    uses = sorted(site.uses, key=lambda use: order[use.node])
    return tuple(_tap(site, use, nodes) for use in uses)


def _tap(site: Site, use: Use, nodes: Mapping[str, fx.Node]) -> Tap:
    context = () if use.inside else tuple((name, nodes[node]) for name, node in use.context)
    shape = site.shape if use.layout is None else (site.in_features, site.out_features)
    return Tap(site.fqn, nodes[use.reads], nodes[use.gives], use.layout or site.layout, context, shape)


def placeholder_values(program: Program, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the values of the graph's placeholders, in order; what `inputs` lacks gets the program's default."""
    return list(program.inputs.fill(inputs).values())


def row_mask(
    node: fx.Node, value: Tensor, masks: Mapping[str, Tensor], shapes: Mapping[str, Tensor], *, whole: bool = False
) -> Tensor | None:
    """Return which rows of `value`, shape (..., features), are no padding: a flat bool tensor, or None for all.

    masks: the batch's attention masks that hold zeros; shapes: the traced masks (symbolic shapes) by the same names. A
    mask applies where the traced leading sizes of the node are the mask's, (batch, sequence, …) or flattened to one;
    where nothing was traced, the sizes of this batch decide. A pooled value has one row a sample and no mask. whole: every
    entry of the value is a row (indices).
    """
    traced = node.meta.get("val")
    for name, mask in masks.items():
        leading, wanted = _sizes(value, whole=whole), _sizes(mask, whole=True)
        if isinstance(traced, Tensor) and name in shapes:
            leading, wanted = _sizes(traced, whole=whole), _sizes(shapes[name], whole=True)
        if leading == wanted or leading == [_product(wanted)]:
            return mask.reshape(-1).bool()
    return None


def tap_mask(
    tap: Tap, node: fx.Node, value: Tensor, masks: Mapping[str, Tensor], shapes: Mapping[str, Tensor]
) -> Tensor | None:
    """Return the `row_mask` of what a tap reads, or gives; pixels are no padding, and bags count all that they read."""
    if tap.layout.kind in ("conv", "embedding_bag", "experts"):
        return None
    return row_mask(node, value, masks, shapes, whole=tap.layout.looked_up and node is tap.reads)


def padding_masks(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the two-dimensional masks of a batch that hide a token."""
    return {
        name: value
        for name, value in inputs.items()
        if name.endswith("mask") and value.ndim == 2 and not bool(value.bool().all())
    }


def traced_masks(program: Program) -> dict[str, Tensor]:
    """Return the traced values of the program's mask inputs, by name."""
    found = {}
    for node in program.graph_module.graph.nodes:
        name = str(node.target)
        if node.op == "placeholder" and name.endswith("mask") and isinstance(node.meta.get("val"), Tensor):
            found[name] = node.meta["val"]
    return found


def traced_sizes(node: fx.Node, value: Tensor) -> list[Any]:
    """Return the sizes of a node's value as traced (symbolic where they are dynamic), or of `value` if nothing was traced."""
    traced = node.meta.get("val")
    return _sizes(traced if isinstance(traced, Tensor) else value, whole=True)


def _sizes(value: Tensor, *, whole: bool = False) -> list[Any]:
    """Return the leading sizes, or all of them, as numbers or symbolic expressions."""
    shape = value.shape if whole else value.shape[:-1]
    return [size.node.expr if isinstance(size, torch.SymInt) else size for size in shape]


def _product(sizes: Sequence[Any]) -> Any:
    product: Any = 1
    for size in sizes:
        product = product * size
    return product


def pieces(
    layout: Layout, value: Tensor, mask: Tensor | None, features: int = 0, context: Mapping[str, Tensor] | None = None
) -> Iterator[Piece]:
    """Yield what a site of `features` inputs reads as unpadded rows, and which rows of all they are.

    Patches of an image are many times larger than the image: they are made for a few samples at a time.
    """
    if isinstance(layout, Bags):
        entries = layout.entries(value, features, context or {})
        yield Piece(value, slice(0, entries.number), entries)
        return
    if isinstance(layout, Banks):
        rows = rows_of(value, None)
        yield Piece(rows, slice(0, len(rows)), owners=layout.owners(value, context or {}))
        return
    if layout.kind != "conv":
        rows = rows_of(layout.inputs(value), mask)
        yield Piece(rows, slice(0, len(rows)))
        return
    samples, start = len(value), 0
    largest = layout.inputs(value[:1]).numel() * value.element_size() if samples else 1
    step = max(1, PIECE // max(largest, 1))
    for first in range(0, samples, step):
        rows = rows_of(layout.inputs(value[first : first + step]), None)
        yield Piece(rows, slice(start, start + len(rows)))
        start += len(rows)


def rows_of(value: Tensor, mask: Tensor | None) -> Tensor:
    """Return the unpadded rows of a value as (tokens, features)."""
    rows = value.detach().reshape(-1, value.shape[-1])
    return rows if mask is None else rows[mask]
