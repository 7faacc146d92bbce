"""Labels sent through a graph: every node's rule says how the labels of what it gives follow from those of what it reads."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lrc.maps import LinearMap
from lrc.program.dependency.labels import Axes, Ledger
from lrc.program.find import plain_name
from lrc.program.norms import module_of
from lrc.program.program import Program
from lrc.program.sites import Site, Use

SILENT = {torch.ops.aten._assert_tensor_metadata.default, torch.ops.aten.sym_size.int, torch.ops.aten.sym_numel.default}
Value = Axes | Sequence[Axes] | None
NodeRule = Callable[["Flow", fx.Node], Value]
SITE_RULES: dict[str, Callable[["Flow", fx.Node, Site, Use, LinearMap], Axes]] = {}
RULES: dict[Any, NodeRule] = {}


def rule(*targets: Any) -> Callable[[NodeRule], NodeRule]:
    """Let a function be the rule of some operators."""

    def decorate(function: NodeRule) -> NodeRule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return decorate


def erase_unread(program: Program) -> None:
    """Take operators out of a graph whose values nothing reads, as the mean of attention weights that nobody asked for.

    Such a value would tie what it is computed from.
    """
    graph = program.graph_module.graph
    uses = {use.node for site in program.sites.values() for use in site.uses}
    for node in reversed(list(graph.nodes)):
        idle = node.op == "call_function" and not node.users and node.name not in uses
        if idle and node.target not in SILENT and not node.is_impure():
            graph.erase_node(node)
    program.__dict__.pop("nodes", None)


class Flow:
    """One walk over a program whose sites are all raised. values: the labels of every node's value."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.ledger = Ledger()
        self.values: dict[fx.Node, Value] = {}
        self.uses = {use.node: (site, use) for site in program.sites.values() for use in site.uses}
        module = program.graph_module
        self.tensors: dict[str, Tensor] = {**dict(module.named_parameters(remove_duplicate=False))}
        self.tensors |= dict(module.named_buffers(remove_duplicate=False))

    def run(self) -> None:
        """Walk the graph."""
        for node in self.program.graph_module.graph.nodes:
            self.values[node] = self.value(node)

    def value(self, node: fx.Node) -> Value:
        """Return the labels of what a node gives."""
        if node.op == "placeholder":
            return self.plain(node)
        if node.op == "get_attr":
            return self.stored(node)
        if node.op == "output":
            self.fix_inputs(node, "the model gives it as an output")
            return None
        if node.op == "call_module":
            return self.module(node)
        if node.target in SILENT:
            return None
        found = RULES.get(node.target)
        if found is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
            found = RULES["pointwise"]
        if found is None:
            self.fix_inputs(node, f"{self.named(node)} reads it, which has no rule")
            return self.plain(node)
        return found(self, node)

    def module(self, node: fx.Node) -> Value:
        """Return the labels of what a map gives."""
        if node.name not in self.uses or self.uses[node.name][0].kind not in SITE_RULES:
            self.fix_inputs(node, f"{node.target} reads it")
            return self.plain(node)
        site, use = self.uses[node.name]
        made: Any = self.program.graph_module.get_submodule(str(node.target))
        return SITE_RULES[site.kind](self, node, site, use, made)

    def stored(self, node: fx.Node) -> Value:
        """Return the labels of a stored tensor: every dimension has its own."""
        tensor = self.tensors.get(str(node.target))
        if tensor is None:
            return None
        name = self.program.names.canonical.get(str(node.target), str(node.target))
        parts = [
            self.ledger.joined((dim,), self.ledger.of(("tensor", name, str(dim)), size))
            for dim, size in enumerate(tensor.shape)
        ]
        return Axes(tuple(tensor.shape), tuple(part for part in parts if part))

    def plain(self, node: fx.Node) -> Value:
        """Return the value of a node none of whose dimensions can be cut."""
        value = node.meta.get("val")
        if isinstance(value, list | tuple):
            return [Axes(tuple(part.shape)) for part in value if isinstance(part, Tensor)]
        return Axes(tuple(value.shape)) if isinstance(value, Tensor) else None

    def shape(self, node: fx.Node) -> tuple[Any, ...]:
        """Return the sizes of what a node gives."""
        return tuple(node.meta["val"].shape)

    def axes(self, node: Any) -> Axes:
        """Return the labels of an argument; a number has none."""
        found = self.values.get(node) if isinstance(node, fx.Node) else None
        return found if isinstance(found, Axes) else Axes(())

    def named(self, node: fx.Node) -> str:
        """Return a node for people: what it does, and in which module."""
        module = module_of(node)
        return f"{plain_name(node.target)} in {module}" if module else plain_name(node.target)

    def fix_inputs(self, node: fx.Node, reason: str) -> None:
        """Say that nothing of what a node reads can be cut."""
        for read in node.all_input_nodes:
            found = self.values.get(read)
            for value in found if isinstance(found, list) else [found]:
                if isinstance(value, Axes):
                    self.ledger.fixed(value, reason)

    def arguments(self, node: fx.Node, names: Sequence[str]) -> Mapping[str, Any]:
        """Return arguments of a node by the names of its operator's schema, its defaults among them."""
        schema = node.target._schema.arguments  # type: ignore[union-attr]  # an operator
        given = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
        given |= {argument.name: value for argument, value in zip(schema, node.args, strict=False)}
        given |= node.kwargs
        return {name: given[name] for name in names}
