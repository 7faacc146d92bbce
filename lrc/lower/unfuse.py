"""A pass over Inductor's graphs: on the CPU a bias is added by the kernel that reads a product, not copied into it first."""

from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

aten = torch.ops.aten
OTHERS = (aten.sym_size.int, aten.var_mean.correction, aten.mean.dim, aten.sum.dim_IntList, aten.amax.default)
VIEWS = (aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim)


class UnfuseBias(CustomGraphPass):
    """Turn `addmm(bias, x, w)` into `mm(x, w) + bias` where only elementwise work and reductions follow.

    ATen's addmm on the CPU writes the bias into every row of the result before BLAS adds the product to it: a pass over
    memory that the fused kernel after it (GELU, residual and layer norm) does at no cost.
    """

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite the graph in place."""
        for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
            bias, x, weight = node.args
            value = node.meta.get("val")
            if node.kwargs or value is None or value.device.type != "cpu" or bias.meta["val"].ndim != 1:
                continue
            if not all(is_fused(user) for user in users(node)):
                continue
            with graph.inserting_before(node):
                product = graph.call_function(aten.mm.default, (x, weight))
                total = graph.call_function(aten.add.Tensor, (product, bias))
            product.meta["val"] = total.meta["val"] = value
            node.replace_all_uses_with(total)
            graph.erase_node(node)

    def uuid(self) -> Any:
        """Return what Inductor's cache knows this pass by."""
        return get_hash_for_files((__file__,))


def users(node: fx.Node) -> list[fx.Node]:
    """Return what reads a value, through views."""
    found = []
    for user in node.users:
        found += users(user) if user.target in VIEWS else [user]
    return found


def is_fused(node: fx.Node) -> bool:
    """Say whether Inductor makes a kernel of its own for a node, which can add the bias; or none at all, for a size."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in node.target.tags or node.target in OTHERS
