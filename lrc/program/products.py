"""A node that applies a stored tensor as a matrix, and the tensor that a node reads."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from lrc.maps import Layout

aten = torch.ops.aten

FLIPS = {aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default}
PASSES = {aten.detach.default, aten.alias.default}


@dataclass(frozen=True)
class Product:
    """A product with a stored tensor.

    node: the node whose value is the layer's output; reads: the layer's input; weight, bias: the names of the tensors;
    layout: how the tensor acts as a matrix; context: what else the map is given, by the names of its arguments.
    """

    node: fx.Node
    reads: fx.Node
    weight: str
    bias: str | None
    layout: Layout
    context: Mapping[str, fx.Node] = field(default_factory=dict)


def stored(node: Any) -> tuple[str, int] | None:
    """Return the name of the stored tensor that a node reads and how often it is transposed on the way."""
    flips = 0
    while isinstance(node, fx.Node) and node.op == "call_function" and node.target in FLIPS | PASSES:
        flips += node.target in FLIPS
        node = node.args[0]
    if isinstance(node, fx.Node) and node.op == "get_attr":
        return str(node.target), flips
    return None
