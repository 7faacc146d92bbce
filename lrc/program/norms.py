"""Recognising the norms of an ATen graph: LayerNorm and RMSNorm as one operation, and RMSNorm spelled out."""

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lrc.program.products import stored

aten = torch.ops.aten
ADDS = {aten.add.Tensor, aten.add_.Tensor, operator.add}
CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default}


@dataclass(frozen=True)
class Norm:
    """A normalisation of the stream. fqn: its module; reads, gives: names of nodes; centers: a mean is taken off first."""

    fqn: str
    reads: str
    gives: str
    weight: str | None
    bias: str | None
    eps: float
    centers: bool


def match_norm(node: fx.Node) -> tuple[Norm, fx.Node] | None:
    """Return the norm that a node gives and the node that it reads, or None: LayerNorm, RMSNorm, or the latter spelled out."""
    if node.target == aten.layer_norm.default:
        return _fused(node, centers=True)
    if node.target == aten.rms_norm.default:
        return _fused(node, centers=False)
    return _spelled_out(node)


def _fused(node: fx.Node, *, centers: bool) -> tuple[Norm, fx.Node] | None:
    arguments = [*node.args, None, None, None][:5]
    x, shape, weight, bias, eps = arguments if centers else (*arguments[:3], None, arguments[3])
    sources = [None if given is None else stored(given) for given in (weight, bias)]
    missing = any(given is not None and source is None for given, source in zip((weight, bias), sources, strict=True))
    if not isinstance(x, fx.Node) or not isinstance(shape, list | tuple) or len(shape) != 1 or missing:
        return None
    if eps is None:
        eps = 1e-5 if centers else torch.finfo(x.meta["val"].dtype).eps
    names = [None if source is None else source[0] for source in sources]
    owner = next((name.rpartition(".")[0] for name in names if name is not None), module_of(node))
    return Norm(owner, x.name, node.name, names[0], names[1], float(eps), centers), x  # type: ignore[arg-type]  # a number


def _spelled_out(node: fx.Node) -> tuple[Norm, fx.Node] | None:
    """Match weight * cast(x * rsqrt(mean(x²) + eps))."""
    if node.target != aten.mul.Tensor:
        return None
    for weight, scaled in (node.args, node.args[::-1]):
        source = stored(weight)
        normalised = without_casts(scaled) if isinstance(scaled, fx.Node) else None
        if source is None or normalised is None or normalised.target != aten.mul.Tensor:
            continue
        for x, root in (normalised.args, normalised.args[::-1]):
            eps = _root_of_mean_square(root, x)
            if eps is not None and isinstance(x, fx.Node):
                before = x.args[0] if x.target in CASTS else None
                read = before if isinstance(before, fx.Node) and _dtype(before) != _dtype(x) else x
                return Norm(source[0].rpartition(".")[0], read.name, node.name, source[0], None, eps, False), read
    return None


def _root_of_mean_square(node: Any, x: Any) -> float | None:
    """Return the eps of rsqrt(mean(x²) + eps) over the last dimension, or None for anything else."""
    if not isinstance(node, fx.Node) or node.target != aten.rsqrt.default:
        return None
    total: Any = node.args[0]
    if total.target not in ADDS or not isinstance(total.args[1], float | int):
        return None
    mean: Any = total.args[0]
    if not isinstance(mean, fx.Node) or mean.target != aten.mean.dim or mean.args[1] != [-1]:
        return None
    squares: Any = mean.args[0]
    return float(total.args[1]) if squares.target == aten.pow.Tensor_Scalar and squares.args == (x, 2) else None


def inside_norm(gives: fx.Node, reads: fx.Node) -> Iterable[fx.Node]:
    """Return the nodes that a norm is made of, the value that it reads left out."""
    waiting = [gives]
    found: dict[fx.Node, None] = {}
    while waiting:
        node = waiting.pop()
        if node is not reads and node not in found:
            found[node] = None
            waiting += node.all_input_nodes
    return found


def without_casts(node: fx.Node) -> fx.Node:
    """Return what a node is a cast of."""
    while node.target in CASTS:
        node = node.args[0]  # type: ignore[assignment]  # a node
    return node


def module_of(node: fx.Node) -> str:
    """Return the name of the module whose `forward` made a node, "" where it is not known."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]).removeprefix("L['self'].").strip(".") if stack else ""


def _dtype(node: Any) -> torch.dtype | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dtype if isinstance(value, Tensor) else None
