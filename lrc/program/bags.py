"""Recognising the embeddings of bags in an ATen graph."""

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from lrc.maps import Bags
from lrc.maps.bag import Mode
from lrc.program.products import Product, stored

aten = torch.ops.aten
MODES: tuple[Mode, ...] = ("sum", "mean", "max")
FLAT = [-1]


def match_bag(node: fx.Node, tensors: Mapping[str, Tensor]) -> Product | None:
    """Return the embedding of bags whose value `node` takes out of the operator's four, or None."""
    if node.target != operator.getitem or node.args[1] != 0:
        return None
    call = node.args[0]
    if not isinstance(call, fx.Node) or call.target not in (aten.embedding_bag.padding_idx, aten.embedding_bag.default):
        return None
    if any(user is not node and user.users for user in call.users):
        return None
    given: list[Any] = [*call.args, *[None] * (9 - len(call.args))]
    table, ids, offsets, _, mode, _, weights, last_offset, padding = given
    source = stored(table)
    if source is None or source[1] or tensors[source[0]].ndim != 2 or not isinstance(ids, fx.Node) or stored(ids) is not None:
        return None
    layout = Bags(padding if isinstance(padding, int) and padding >= 0 else None, MODES[mode or 0], bool(last_offset))
    whole = _whole(ids, offsets)
    context = {} if whole is not None else {"offsets": offsets}
    if weights is not None:
        context["per_sample_weights"] = weights if whole is None else weights.args[0]
    return Product(node, ids if whole is None else whole, source[0], None, layout, context)


def _whole(ids: fx.Node, offsets: Any) -> fx.Node | None:
    """Return the (bags, size) indices that were flattened, and cut again at every `size`, or None."""
    if ids.target != aten.reshape.default or ids.args[1] != FLAT or not isinstance(offsets, fx.Node):
        return None
    before = ids.args[0]
    if offsets.target != aten.arange.start_step or not isinstance(before, fx.Node):
        return None
    value, starts = before.meta.get("val"), offsets.meta.get("val")
    if not isinstance(value, Tensor) or value.ndim != 2 or not isinstance(starts, Tensor):
        return None
    start, _, step = offsets.args
    width = step.meta.get("val") if isinstance(step, fx.Node) else step
    return before if start == 0 and _same(width, value.shape[1]) and _same(starts.shape[0], value.shape[0]) else None


def _same(one: Any, other: Any) -> bool:
    """Say whether two sizes are the same, as numbers or as traced."""
    first, second = (size.node.expr if isinstance(size, torch.SymInt) else size for size in (one, other))
    return bool(first == second)
