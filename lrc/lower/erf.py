"""A pass over Inductor's graphs: on the CPU, erf as a rational function, cheaper than the one with an exponential."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

aten = torch.ops.aten

# erf(x) = x P(x^2) / Q(x^2) on |x| <= LIMIT, beyond which erf is 1 in float32. The fit has the least largest error (Lawson's
# iteration on the linearised problem in float64): 1.6e-8; evaluated in float32, 4.4e-7, where torch.erf has 1.8e-7.
LIMIT = 3.92
NUMERATOR = (1.12837902, 0.192764506, 0.0530605332, 3.86834472e-3, 2.87479510e-4, 2.03472803e-6)
DENOMINATOR = (1.0, 0.504164762, 0.115084798, 0.0151723306, 1.18811885e-3, 3.80705759e-5)


class RationalErf(CustomGraphPass):
    """Write erf of a float32 tensor on the CPU as a quotient of two polynomials, which Inductor fuses into its kernel.

    The vectorised erf costs more than the rest of a GELU, its bias and its memory traffic together.
    """

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite the graph in place."""
        for node in graph.find_nodes(op="call_function", target=aten.erf.default):
            value = node.meta.get("val")
            if value is None or value.device.type != "cpu" or value.dtype is not torch.float32:
                continue
            with graph.inserting_before(node):
                made = rational(Builder(graph, value), node.args[0])
            node.replace_all_uses_with(made)
            graph.erase_node(node)

    def uuid(self) -> Any:
        """Return what Inductor's cache knows this pass by."""
        return get_hash_for_files((__file__,))


class Builder:
    """Calls of operators that keep the shape, dtype and device of one value."""

    def __init__(self, graph: fx.Graph, value: torch.Tensor) -> None:
        self.graph, self.value = graph, value

    def __call__(self, target: torch._ops.OpOverload, *args: Any) -> fx.Node:
        """Add a call, described as the value is."""
        node = self.graph.call_function(target, args)
        node.meta["val"] = self.value
        return node


def rational(call: Builder, x: Any) -> fx.Node:
    """Add the nodes that compute erf(x)."""
    inside = call(aten.clamp_max.default, call(aten.clamp_min.default, x, -LIMIT), LIMIT)
    square = call(aten.mul.Tensor, inside, inside)
    numerator = call(aten.mul.Tensor, inside, polynomial(call, square, NUMERATOR))
    return call(aten.div.Tensor, numerator, polynomial(call, square, DENOMINATOR))


def polynomial(call: Builder, x: fx.Node, coefficients: Sequence[float]) -> fx.Node:
    """Add the nodes of sum_k coefficients[k] x^k by Horner's rule."""
    *lower, last = coefficients
    total = call(aten.mul.Tensor, x, last)
    for coefficient in reversed(lower[1:]):
        total = call(aten.mul.Tensor, call(aten.add.Tensor, total, coefficient), x)
    return call(aten.add.Tensor, total, lower[0])
