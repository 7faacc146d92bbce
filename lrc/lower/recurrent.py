"""Loops over time that a file runs by one operator: those whose hidden states' weight is small enough to be multiplied out."""

from typing import Any

import torch
from torch import Tensor, fx

from lrc.maps import Dense, LinearMap
from lrc.maps.fused_recurrence import FusedRecurrence, is_small, stands
from lrc.maps.recurrence import Recurrence, recur
from lrc.program import Program
from lrc.program.recurrences import Direction

STATES = {"tap", "hidden", "memory"}  # what a loop reads; more is for its map, or a projection


def with_operators(program: Program) -> Program:
    """Return the program with the operator of `FusedRecurrence` for every loop that has one; itself where none has."""
    if not any(one.created for one in program.recurrent.values()):
        return program
    twin = program.clone()
    for one in twin.recurrent.values():
        for part in one.directions if one.created else ():
            replaced(twin, part)
    twin.graph_module.graph.lint()
    return twin


def replaced(twin: Program, part: Direction) -> None:
    """Put the operator in the place of one loop and of what gives its gates, where both are single weights of little size."""
    graph = twin.graph_module.graph
    nodes = {node.name: node for node in graph.nodes}
    loop, gates = nodes[part.states], nodes[part.gates]
    inputs, states = input_map(twin, gates), state_map(twin, loop)
    if part.projection or inputs is None or states is None or not (stands(inputs) and is_small(states)):
        return
    name = f"{part.at}_operator"
    twin.graph_module.add_submodule(name, FusedRecurrence(part.cell, inputs, states).eval())
    read = nodes.get(part.read)
    if read is not None and not read.users:
        graph.erase_node(read)
    with graph.inserting_before(loop):
        start = [nodes[f"{part.at}_{state}"] for state in ("hidden", "memory") if f"{part.at}_{state}" in nodes]
        made = graph.call_module(name, (gates.args[0], *start))
    made.meta = dict(loop.meta)
    loop.replace_all_uses_with(made)
    for node in (loop, nodes[part.tap], gates):
        if not node.users:
            graph.erase_node(node)


def input_map(twin: Program, gates: fx.Node) -> LinearMap | None:
    """Return the map of the inputs, or None where it is more than a map of its input."""
    if gates.op == "call_module":
        made: Any = twin.graph_module.get_submodule(str(gates.target))
        return made if isinstance(made, LinearMap) and len(gates.all_input_nodes) == 1 else None
    if gates.target != torch.ops.aten.linear.default:
        return None
    return dense_of(twin, *gates.args[1:])


def state_map(twin: Program, loop: fx.Node) -> LinearMap | None:
    """Return the map of the hidden states, or None where the loop reads more than its states."""
    if loop.op == "call_module":
        made: Any = twin.graph_module.get_submodule(str(loop.target))
        return made.map if isinstance(made, Recurrence) and set(loop.kwargs) <= STATES else None
    return dense_of(twin, *loop.args[5:7]) if loop.target is recur else None


def dense_of(twin: Program, weight: Any, bias: Any = None) -> LinearMap | None:
    """Return a stored weight and bias as a map."""
    held = [attribute(twin, node) for node in (weight, bias)]
    return None if held[0] is None or (bias is not None and held[1] is None) else Dense(held[0], held[1])


def attribute(twin: Program, node: Any) -> Tensor | None:
    """Return the tensor that a node reads from the module, or None."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    owner, _, name = str(node.target).rpartition(".")
    found: Tensor = getattr(twin.graph_module.get_submodule(owner), name)
    return found
