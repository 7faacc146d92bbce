"""A graph module whose code is made when it first runs: most copies of a graph are edited before, or never run."""

import copy
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.graph import PythonCode
from torch.fx.node import map_arg


class LateGraphModule(fx.GraphModule):
    """A graph module that is not compiled when it is made, but by the first call, by `recompile`, or by `compiled`.

    root: a graph module, of whose tree it takes what the nodes of `graph` read, sharing the tensors.
    """

    _lrc_uncompiled: bool = False  # a name that no submodule of a user has

    def __init__(self, root: fx.GraphModule, graph: fx.Graph) -> None:
        super().__init__({}, fx.Graph(), "GraphModule")
        self.training = root.training
        self.meta.update(root.meta)
        share_read(root, self, [str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")])
        self._lrc_uncompiled = True
        self.graph = graph

    def recompile(self) -> PythonCode:
        """Make the code of the graph, but for the first time, which is that of the constructor."""
        if self._lrc_uncompiled:
            self._lrc_uncompiled = False
            type(self).forward = _compile_and_run  # every graph module has a class of its own
            return PythonCode("", {}, None)
        return super().recompile()


def copied(graph: fx.Graph) -> fx.Graph:
    """Return a copy of a graph, as `copy.deepcopy` makes it, without looking again for symbols among the arguments.

    That search, for a warning that the original would have given, takes a third of the time of a copy.
    """
    twin = fx.Graph(tracer_cls=graph._tracer_cls)
    made: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        made[node] = new = twin.create_node(node.op, node.target, name=node.name, type_expr=node.type)
        new.args = map_arg(node.args, made.__getitem__)
        if node.kwargs:
            new.kwargs = map_arg(node.kwargs, made.__getitem__)
        new.meta = copy.copy(node.meta)
    twin.set_codegen(copy.deepcopy(graph._codegen))
    return twin


def share_read(source: nn.Module, target: nn.Module, names: list[str]) -> None:
    """Put what stands at names of one tree at the same names of another one, whose modules in between are made anew."""
    pairs = {"": (source, target)}

    def pair(name: str) -> tuple[nn.Module, nn.Module]:
        if name not in pairs:
            owner, _, last = name.rpartition(".")
            old, new = pair(owner)
            child: Any = old._modules[last]
            if last not in new._modules:
                new._modules[last] = nn.Module()
            made: Any = new._modules[last]
            pairs[name] = (child, made)
        return pairs[name]

    for name in names:
        owner, _, last = name.rpartition(".")
        old, new = pair(owner)
        for kind in ("_parameters", "_buffers", "_modules"):
            if last in getattr(old, kind):
                getattr(new, kind)[last] = getattr(old, kind)[last]
                break
        else:  # a constant that is a plain attribute
            value = getattr(old, last)
            new._buffers.update({last: value}) if isinstance(value, Tensor) else setattr(new, last, value)
        if last in old._non_persistent_buffers_set:
            new._non_persistent_buffers_set.add(last)


def compiled(graph_module: fx.GraphModule) -> None:
    """Make the code of a graph module that has none yet: for what reads `forward` before it calls it."""
    if type(graph_module).forward is _compile_and_run:
        graph_module.recompile()


def _compile_and_run(graph_module: Any, *args: Any, **kwargs: Any) -> Any:
    graph_module.recompile()
    return graph_module(*args, **kwargs)
