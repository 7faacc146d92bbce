"""Parts of a stored tensor that a graph reads one by one become tensors of their own, which share its memory.

%w = split(attn.in_proj_weight, [16, 32]);  linear(%x, %w[0]);  linear(%y, %w[1])
->    linear(%x, attn.in_proj_weight_0_16);  linear(%y, attn.in_proj_weight_16_48)
"""

import operator
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

aten = torch.ops.aten
SPLITS = {aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default}


def split_weights(module: nn.Module, graph: fx.Graph) -> dict[str, Tensor]:
    """Give the graph the parts of vectors and matrices that it cuts along their first dimension, held by `module`.

    The new names end in the first row of a part and the first one after it. Returns the new tensors by name.
    """
    made: dict[str, Tensor] = {}
    stored: Mapping[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    for node in list(graph.nodes):
        whole = node.args[0] if node.op == "call_function" and node.target in SPLITS else None
        tensor = stored.get(str(whole.target)) if isinstance(whole, fx.Node) and whole.op == "get_attr" else None
        along = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
        if (
            not isinstance(whole, fx.Node)
            or tensor is None
            or along != 0
            or tensor.ndim > 2
            or any(user.target is not operator.getitem for user in node.users)
        ):
            continue
        pieces = node.target(tensor.detach(), *node.args[1:])
        starts = [0, *torch.tensor([len(piece) for piece in pieces]).cumsum(0).tolist()]
        for user in list(node.users):
            place = int(user.args[1])
            name = f"{whole.target}_{starts[place]}_{starts[place + 1]}"
            made[name] = part = nn.Parameter(pieces[place], requires_grad=tensor.requires_grad)
            owner, _, last = name.rpartition(".")
            module.get_submodule(owner).register_parameter(last, part)
            with graph.inserting_before(user):
                read = graph.get_attr(name)
            read.meta = dict(user.meta)
            user.replace_all_uses_with(read)
            graph.erase_node(user)
        graph.erase_node(node)
        if not whole.users:
            graph.erase_node(whole)
    return made
