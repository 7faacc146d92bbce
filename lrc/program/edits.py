"""Edits of a graph module: the node of a linear becomes a call, and what stands at a name in the tree changes."""

import operator
from collections.abc import Callable, Iterable, Set
from typing import TYPE_CHECKING

from torch import Tensor, fx, nn

if TYPE_CHECKING:
    from lrc.program.sites import Use

Aliases = Callable[[str], Iterable[str]]


def raise_uses(graph_module: fx.GraphModule, uses: "Iterable[Use]", taken: Set[str], aliases: Aliases) -> None:
    """Turn the ATen nodes of a site's uses into calls of the modules that they name.

    taken: the names where maps stand. Tensors below the new ones that are still read get another name: that of a tie
    (`aliases`), or a new one.
    """
    graph = graph_module.graph
    uses = tuple(uses)
    named = {name for use in uses for name in (use.node, use.input, *(node for _, node in use.context))}
    nodes = {node.name: node for node in graph.nodes if node.name in named}
    for use in uses:
        old = nodes[use.node]
        with graph.inserting_before(old):
            context = {name: nodes[node] for name, node in use.context}
            new = graph.create_node("call_module", use.module, (nodes[use.input],), context)
        new.meta = dict(old.meta)
        old.replace_all_uses_with(new)
        erase_unused(graph, old)
        new.name = use.node
        nodes[use.node] = new
    modules = {use.module for use in uses}
    below = tuple(f"{module}." for module in modules)
    read = set()
    for node in graph.find_nodes(op="get_attr"):
        if str(node.target).startswith(below) or node.target in modules:
            if not node.users:
                graph.erase_node(node)
                continue
            _rename(graph_module, node, modules | taken, aliases)
        read.add(str(node.target))
    for use in uses:
        if use.bias is not None and use.bias not in read:
            _drop(graph_module, use.bias)


def put(root: nn.Module, fqn: str, made: nn.Module | Tensor) -> None:
    """Set a submodule or tensor, in place of the module or tensor of that name; parents that are missing are made."""
    *parents, name = fqn.split(".")
    for parent in parents:
        if parent not in root._modules:
            root._modules[parent] = nn.Module()
        root = root._modules[parent]  # type: ignore[assignment]  # none of them is None
    _drop(root, name)
    if isinstance(made, Tensor) and not isinstance(made, nn.Parameter):
        root.register_buffer(name, made)
    else:
        setattr(root, name, made)


def _drop(root: nn.Module, fqn: str) -> None:
    """Remove what stands at a name, if anything does."""
    owner, _, name = fqn.rpartition(".")
    parent = root.get_submodule(owner)
    for held in (parent._parameters, parent._buffers, parent._modules):
        held.pop(name, None)


def _rename(graph_module: fx.GraphModule, node: fx.Node, taken: Set[str], aliases: Aliases) -> None:
    name = str(node.target)
    free = [alias for alias in aliases(name) if not _is_below(alias, taken)]
    node.target = free[0] if free else f"{name.replace('.', '_')}_kept"
    put(graph_module, node.target, operator.attrgetter(name)(graph_module))


def erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node that nothing uses, and then every input of it that nothing else uses.

    Of an operator with several values, those that nothing reads are no uses.
    """
    for part in [user for user in node.users if user.target is operator.getitem and not user.users]:
        graph.erase_node(part)
    if node.users or node.op == "placeholder" or node._erased:
        return
    reads = node.all_input_nodes
    graph.erase_node(node)
    for read in reads:
        erase_unused(graph, read)


def _is_below(name: str, modules: Set[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)
