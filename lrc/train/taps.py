"""A graph that also returns what some of its nodes give."""

from collections.abc import Mapping

from torch import fx

from lrc.program import Program


def tapped(program: Program, graph_module: fx.GraphModule, fqns: list[str]) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """Return a graph module that shares every tensor, with the outputs of sites beside its own; and the names of those.

    graph_module: of `program`, or of its training mode. A site that is used more than once gives one output a use.
    """
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    outputs = graph.graph_copy(graph_module.graph, copied)
    assert isinstance(outputs, Mapping), "a program returns a mapping"
    nodes = {node.name: copied[node] for node in graph_module.graph.nodes if node in copied}
    taps = {f"{fqn}#{use.node}": nodes[use.gives] for fqn in fqns for use in program.site(fqn).uses}
    graph.output({**outputs, **taps})
    graph.lint()
    return fx.GraphModule(graph_module, graph), tuple(taps)
