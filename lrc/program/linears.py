"""Recognising the linears of an ATen graph, before and after decomposition, by what the nodes compute."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from lrc.maps import Rows
from lrc.program.products import Product, stored

aten = torch.ops.aten

VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints}


def match_linear(node: fx.Node, tensors: Mapping[str, Tensor]) -> Product | None:
    """Return the linear that `node` computes, or None. tensors: the stored tensors by name."""
    args = node.args
    bias: Any = None
    if node.target == aten.linear.default:
        x, weight, bias = args[0], args[1], args[2] if len(args) > 2 else None
        stored_transposed = False
    elif node.target == aten.addmm.default and not node.kwargs:
        bias, x, weight = args
        stored_transposed = True
    elif node.target in (aten.mm.default, aten.matmul.default):
        x, weight = args
        stored_transposed = True
    elif node.target == aten.bmm.default:
        return _batched(node, tensors)
    else:
        return None
    source = stored(weight)
    bias_name = stored(bias) if bias is not None else None
    if source is None or not isinstance(x, fx.Node) or (bias is not None and bias_name is None):
        return None
    (name, flips), flipped_bias = source, bias_name[1] if bias_name else 0
    if tensors[name].ndim != 2 or stored(x) is not None or flipped_bias:
        return None
    if bias_name is not None and tensors[bias_name[0]].ndim != 1:
        return None
    transposed = stored_transposed != bool(flips % 2)
    reads, gives = _without_views(x, node)
    return Product(gives, reads, name, bias_name[0] if bias_name else None, Rows(transposed))


def _batched(node: fx.Node, tensors: Mapping[str, Tensor]) -> Product | None:
    """Match a product that was spread over a batch, as decompositions do where the input's memory is not in order.

    It is `bmm(view(expand(x)), view(expand(weight.T)))`, a view back to the leading sizes of x, and an addition of the bias.
    """
    x, weight = node.args
    source = stored(_before_views(weight, 2)[-1])
    if source is None or tensors[source[0]].ndim != 2:
        return None
    gives = node
    after = _only_user(node)
    if after is not None and after.target in VIEWS:
        gives = after
    leading = _leading(gives)
    reads = [read for read in _before_views(x, 1) if leading is not None and _leading(read) == leading]
    if not reads or stored(reads[-1]) is not None:
        return None
    bias = None
    after = _only_user(gives)
    if after is not None and after.target == aten.add.Tensor and after.args[0] is gives and not after.kwargs:
        added = stored(after.args[1])
        if added is not None and tensors[added[0]].shape == (tensors[source[0]].shape[1 - source[1] % 2],):
            bias, gives = added[0], after
    return Product(gives, reads[-1], source[0], bias, Rows(not source[1] % 2))


def _before_views(node: Any, kept: int) -> list[Any]:
    """Return a node and what it is a view or an expansion of, back to where its last `kept` sizes change."""
    found = [node]
    while isinstance(node, fx.Node) and node.target in VIEWS | {aten.expand.default}:
        before: Any = node.args[0]
        old, new = before.meta.get("val"), node.meta.get("val")
        if not isinstance(old, Tensor) or not isinstance(new, Tensor):
            break
        if [_size(s) for s in old.shape[-kept:]] != [_size(s) for s in new.shape[-kept:]]:
            break
        found.append(before)
        node = before
    return found


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _leading(node: Any) -> list[Any] | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return [_size(size) for size in value.shape[:-1]] if isinstance(value, Tensor) else None


def _without_views(x: fx.Node, node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Widen a product on flattened rows (`view, addmm, view`) to the layer's own input and output."""
    if x.op != "call_function" or x.target not in VIEWS or len(node.users) != 1:
        return x, node
    after = next(iter(node.users))
    before = x.args[0]
    if after.op != "call_function" or after.target not in VIEWS or not isinstance(before, fx.Node):
        return x, node
    wide, out = before.meta.get("val"), after.meta.get("val")
    if not isinstance(wide, Tensor) or not isinstance(out, Tensor) or wide.ndim != out.ndim:
        return x, node
    same = all(_size(a) == _size(b) for a, b in zip(wide.shape[:-1], out.shape[:-1], strict=True))
    whole = _size(wide.shape[-1]) == _size(x.meta["val"].shape[-1]) and _size(out.shape[-1]) == _size(
        node.meta["val"].shape[-1]
    )
    return (before, after) if same and whole else (x, node)


def _size(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size
