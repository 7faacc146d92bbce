"""Recognising the linears of an ATen graph, before and after decomposition, by what the nodes compute."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

FLIPS = {aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default}
VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints}
PASSES = {aten.detach.default, aten.alias.default}


@dataclass(frozen=True)
class Linear:
    """A product with a stored matrix.

    node: the node whose value is the layer's output; reads: the layer's input; weight, bias: the names of the tensors;
    transposed: the matrix is stored as (in_features, out_features).
    """

    node: fx.Node
    reads: fx.Node
    weight: str
    bias: str | None
    transposed: bool


def find_linears(graph: fx.Graph, tensors: Mapping[str, Tensor]) -> list[Linear]:
    """Return every linear of the graph, in order. tensors: the stored tensors by name."""
    found = (match(node, tensors) for node in graph.nodes if node.op == "call_function")
    return [linear for linear in found if linear is not None]


def match(node: fx.Node, tensors: Mapping[str, Tensor]) -> Linear | None:
    """Return the linear that `node` computes, or None."""
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
    else:
        return None
    source = _stored(weight)
    bias_name = _stored(bias) if bias is not None else None
    if source is None or not isinstance(x, fx.Node) or (bias is not None and bias_name is None):
        return None
    (name, flips), flipped_bias = source, bias_name[1] if bias_name else 0
    if tensors[name].ndim != 2 or _stored(x) is not None or flipped_bias:
        return None
    if bias_name is not None and tensors[bias_name[0]].ndim != 1:
        return None
    transposed = stored_transposed != bool(flips % 2)
    reads, gives = _without_views(x, node)
    return Linear(gives, reads, name, bias_name[0] if bias_name else None, transposed)


def _stored(node: Any) -> tuple[str, int] | None:
    """Return the name of the stored tensor that a node reads and how often it is transposed on the way."""
    flips = 0
    while isinstance(node, fx.Node) and node.op == "call_function" and node.target in FLIPS | PASSES:
        flips += node.target in FLIPS
        node = node.args[0]
    if isinstance(node, fx.Node) and node.op == "get_attr":
        return str(node.target), flips
    return None


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


def consumers(graph: fx.Graph, linears: list[Linear], tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return, for every stored matrix, the other operations that read it, by their plain names."""
    taken = {id(linear.node) for linear in linears}
    ours = {name for linear in linears for name in (linear.weight,)}
    found: dict[str, list[str]] = {}
    for node in graph.nodes:
        if node.op != "call_function" or id(node) in taken or node.target in FLIPS | PASSES:
            continue
        for read in node.all_input_nodes:
            source = _stored(read)
            if source is None or tensors[source[0]].ndim < 2:
                continue
            if source[0] in ours and match(node, tensors) is not None:
                continue
            found.setdefault(source[0], []).append(plain_name(node.target))
    return found


def plain_name(target: Any) -> str:
    """Return `embedding` for `aten.embedding.default`."""
    name = target.__name__ if hasattr(target, "__name__") else str(target)
    return str(name).split(".", 1)[0].strip("_")
