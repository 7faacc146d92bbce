"""The training mode of a program: the same graph with dropout, batch normalisation and attention dropout switched on.

A program is captured in eval mode. Its graph keeps every dropout with its rate and every batch normalisation with its momentum,
switched off; only the rate of the dropout inside fused attention is lost. That rate is read off a second capture of the
user's module, in training mode, whose attention nodes are the same ones in the same order. The eval graph is not changed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from lrc.program.program import Program

aten = torch.ops.aten
RANDOM = {
    aten.dropout.default, aten.feature_dropout.default, aten.bernoulli.default, aten.rand.default, aten.rand_like.default,
    aten.randn_like.default,
}  # fmt: skip
TRAINING = {  # the place of the argument that says `training`
    aten.dropout.default: 2,
    aten.feature_dropout.default: 2,
    aten.alpha_dropout.default: 2,
    aten.feature_alpha_dropout.default: 2,
    aten.batch_norm.default: 5,
    aten.lstm.input: 6,
    aten.gru.input: 6,
    aten.rnn_tanh.input: 6,
    aten.rnn_relu.input: 6,
}
RUNNING = slice(3, 5)  # of batch_norm's arguments: the running mean and variance
DROPOUT_P = 4  # of scaled_dot_product_attention's arguments


@dataclass(frozen=True)
class TrainingGraph:
    """A program's graph in training mode, which shares every tensor with it, and what could not be switched on.

    running: names of the buffers that batch normalisation updates.
    """

    module: fx.GraphModule
    notes: tuple[str, ...]
    running: frozenset[str]


@dataclass(frozen=True)
class Rates:
    """The dropout rates of fused attention in training mode, by the names of its nodes, and what could not be found out."""

    of: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def training_graph(
    program: Program, *, dropout: bool = True, batch_norm: bool = True, rates: Rates | None = None
) -> TrainingGraph:
    """Return the training mode of a program. batch_norm: use and update the statistics of batches, as in training.

    rates: what `attention_rates` found, which takes a second capture, where that is known already. Run it with the seed of
    torch's default generator set: the random numbers are those that the user's module draws.
    """
    twin = program.clone().graph_module
    notes: list[str] = []
    running: set[str] = set()
    for node in list(twin.graph.nodes):
        place = TRAINING.get(node.target)
        if place is None or not (batch_norm if node.target is aten.batch_norm.default else dropout):
            continue
        _set(node, place, True)
        if node.target is aten.batch_norm.default:
            names = {str(n.target) for n in node.args[RUNNING] if isinstance(n, fx.Node)}
            running |= names
            if names and not node.args[6]:
                notes.append(f"{node.name}: the running statistics stay: their momentum is not in the graph")
    if dropout:
        found = rates or attention_rates(program)
        notes += found.notes
        for node in _attentions(twin.graph):
            if found.of.get(node.name):
                _set(node, DROPOUT_P, found.of[node.name], "dropout_p")
    twin.graph.lint()
    twin.recompile()
    return TrainingGraph(twin, tuple(notes), frozenset(running))


def running_statistics(program: Program) -> frozenset[str]:
    """Return the names of the buffers that batch normalisation updates in training mode."""
    nodes = program.graph_module.graph.find_nodes(op="call_function", target=aten.batch_norm.default)
    return frozenset(str(n.target) for node in nodes for n in node.args[RUNNING] if isinstance(n, fx.Node))


def attention_rates(program: Program) -> Rates:
    """Return the dropout rates that fused attention has in the module's training mode."""
    graph_here = program.graph_module.graph
    here = list(_attentions(graph_here))
    model = program.origin.model
    if model is None:
        why = "dropout inside attention is off: the graph was given without the module that knows its rate"
        return Rates(notes=(why,) if here else ())
    try:
        graph = _in_training(program, model)
    except Exception as error:  # a model's own code may raise anything
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Rates(notes=(f"dropout inside attention is off: the module does not export in training mode: {first}",))
    there = list(_attentions(graph))
    if [_where(node) for node in here] != [_where(node) for node in there]:
        return Rates(notes=("dropout inside attention is off: the module computes attention in another way while it trains",))
    found = {ours.name: float(_argument(theirs, DROPOUT_P, "dropout_p", 0.0)) for ours, theirs in zip(here, there, strict=True)}
    unseen = _count(graph) - _count(graph_here)
    more = f"{unseen} random operations of the training mode (stochastic depth and the like) are not in the graph: off"
    return Rates(found, (more,) if unseen > 0 else ())


def _in_training(program: Program, model: nn.Module) -> fx.Graph:
    """Return the graph of the module as it trains; its modes are restored."""
    modes = {module: module.training for module in model.modules()}
    fixed = {name: value for name, value in program.calling.baked.items() if value is not None}
    kwargs = {**fixed, **program.inputs.examples}
    shapes = program.inputs.dims() | dict.fromkeys(fixed)
    model.train()
    try:
        with torch.no_grad():
            exported = torch.export.export(model, (), kwargs=kwargs, dynamic_shapes=shapes, strict=False)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return exported.module(check_guards=False).graph


def _attentions(graph: fx.Graph) -> Iterator[fx.Node]:
    yield from graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)


def _where(node: fx.Node) -> str:
    """Return the module that a node comes from."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]).removeprefix("L['self'].") if stack else ""


def _count(graph: fx.Graph) -> int:
    return sum(node.op == "call_function" and node.target in RANDOM for node in graph.nodes)


def _argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _set(node: fx.Node, place: int, value: Any, name: str = "") -> None:
    """Set an argument by its place, or by name where the call does not reach that far."""
    if len(node.args) > place:
        node.args = (*node.args[:place], value, *node.args[place + 1 :])
    else:
        node.kwargs = {**node.kwargs, name: value}
