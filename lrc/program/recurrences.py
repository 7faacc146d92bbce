"""The recurrent layers of a graph: one operator of torch's for all layers and times, written out where a weight is wanted.

%y, %h = gru(%x, [%h0], [rnn.weight_ih_l0, rnn.weight_hh_l0, …])
->    %gates = linear(%x, rnn.weight_ih_l0, rnn.bias_ih_l0);  %tap = unseen(%gates)
      %y, %h, … = recur(%gates, %tap, %h0, rnn.weight_hh_l0, …);  %read = previous(%y, %h0)

The weight of the inputs is a linear like any other. That of the hidden states is one inside the loop: what it reads is
`%read`, and the gradient of what it gives is that of `%tap`. An operator of which nothing was rewritten is put back.
"""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from lrc.maps.recurrence import Cell, Kind, previous, recur, unseen
from lrc.program.edits import erase_unused
from lrc.program.products import stored

aten = torch.ops.aten
KINDS: Mapping[Any, Kind] = {
    aten.lstm.input: "lstm", aten.gru.input: "gru", aten.rnn_tanh.input: "tanh", aten.rnn_relu.input: "relu",
}  # fmt: skip
TYPES: Mapping[Kind, str] = {"lstm": "LSTM", "gru": "GRU", "tanh": "RNN", "relu": "RNN"}


@dataclass(frozen=True)
class Direction:
    """One layer in one direction: the names of its nodes, and of its tensors.

    at: what the names of its nodes start with; reads: the node of its input.
    """

    at: str
    reads: str
    place: int
    cell: Cell
    input_weight: str
    hidden_weight: str
    input_bias: str | None
    hidden_bias: str | None
    projection: str | None

    @property
    def gates(self) -> str:
        """The node of what the inputs give."""
        return f"{self.at}_gates"

    @property
    def tap(self) -> str:
        """The node whose gradient is that of what the hidden states give."""
        return f"{self.at}_tap"

    @property
    def states(self) -> str:
        """The node of the loop."""
        return f"{self.at}_states"

    @property
    def read(self) -> str:
        """The node of the hidden states that steps read."""
        return f"{self.at}_read"

    def context(self) -> tuple[tuple[str, str], ...]:
        """Return the other nodes that the loop reads, by the names of its arguments."""
        found: tuple[tuple[str, str], ...] = (("tap", self.tap), ("hidden", f"{self.at}_hidden"))
        found += (("memory", f"{self.at}_memory"),) if self.cell.kind == "lstm" else ()
        return found + ((("projection", f"{self.at}_projection"),) if self.projection else ())


@dataclass(frozen=True)
class Recurrent:
    """One operator: its node's name, its layers in order, each forwards and then backwards, and how it is called.

    given: the names of the nodes that take its values out, each with the place of the value. created: of the nodes that it
    is written out as, in order; none where it is not.
    """

    node: str
    target: Any
    reads: str
    start: tuple[str, ...]
    params: tuple[str, ...]
    flags: tuple[Any, ...]
    directions: tuple[Direction, ...]
    given: tuple[tuple[str, int], ...]
    created: tuple[str, ...] = ()

    @property
    def dropout(self) -> float:
        """The rate between layers."""
        return float(self.flags[2])

    @property
    def layers(self) -> list[tuple[Direction, ...]]:
        """The directions of every layer."""
        step = 2 if self.flags[4] else 1
        return [self.directions[i : i + step] for i in range(0, len(self.directions), step)]

    def weights(self) -> list[str]:
        """Return the names of the tensors that are sites."""
        return [name for part in self.directions for name in (part.input_weight, part.hidden_weight)]


def find_recurrent(graph: fx.Graph, tensors: Mapping[str, Tensor]) -> dict[str, Recurrent]:
    """Return the recurrent operators of a graph whose weights are all stored, by the names of their nodes."""
    made = (_recurrent(node, tensors) for node in graph.nodes if node.target in KINDS)
    found = {one.node: one for one in made if one is not None}
    names = {node.name for node in graph.nodes}
    return {name: one for name, one in found.items() if names.isdisjoint(_names(one))}


def _recurrent(node: fx.Node, tensors: Mapping[str, Tensor]) -> Recurrent | None:
    given: list[Any] = list(node.args)
    if len(given) != 9 or node.kwargs:
        return None
    x, start, params, *flags = given
    has_biases, count, _, _, both, batch_first = flags
    kind = KINDS[node.target]
    hidden: tuple[Any, ...] = tuple(start) if isinstance(start, list | tuple) else (start,)
    users: list[Any] = list(node.users)
    sources = [stored(param) for param in params]
    if not all(source is not None and source[1] == 0 and source[0] in tensors for source in sources):
        return None
    names = [source[0] for source in sources if source is not None]
    if not all(isinstance(read, fx.Node) and isinstance(read.meta.get("val"), Tensor) for read in (x, *hidden)):
        return None
    ways = 2 if both else 1
    each, rest = divmod(len(names), count * ways)
    projected = each - (4 if has_biases else 2)
    if rest or projected not in (0, 1):
        return None
    directions = []
    for place in range(count * ways):
        layer, back = divmod(place, ways)
        own = names[place * each : (place + 1) * each]
        biases = own[2:4] if has_biases else [None, None]
        directions.append(
            Direction(
                f"{node.name}_l{layer}{'_reverse' if back else ''}", x.name if layer == 0 else f"{node.name}_l{layer - 1}",
                place, Cell(kind, bool(batch_first), bool(back)), own[0], own[1], biases[0], biases[1],
                own[-1] if projected else None,
            )
        )  # fmt: skip
    if any(user.target != operator.getitem for user in users):
        return None
    return Recurrent(
        node.name, node.target, x.name, tuple(part.name for part in hidden), tuple(names), tuple(flags), tuple(directions),
        tuple((user.name, int(user.args[1])) for user in users),
    )  # fmt: skip


def _names(one: Recurrent) -> set[str]:
    """Return the names of the nodes that opening an operator makes."""
    of_parts = {
        name for part in one.directions for name in (part.gates, part.states, part.read, *dict(part.context()).values())
    }
    return of_parts | {f"{one.node}_l{layer}" for layer in range(len(one.layers))}


class _Writer:
    """Writes nodes in the place of an operator."""

    def __init__(self, graph: fx.Graph, at: fx.Node, tensors: Mapping[str, Tensor]) -> None:
        self.graph, self.at, self.tensors = graph, at, tensors

    def call(self, target: Any, args: tuple[Any, ...], value: Any, name: str | None = None) -> fx.Node:
        """Write a call that gives something like `value`."""
        with self.graph.inserting_before(self.at):
            node = self.graph.create_node("call_function", target, args, {}, name)
        assert name in (None, node.name), "the names were free"
        node.meta = {**self.at.meta, "val": value}
        return node


def open_recurrent(graph: fx.Graph, one: Recurrent, tensors: Mapping[str, Tensor]) -> Recurrent:
    """Write an operator out, one loop a layer and direction. Returns it with the names of the new nodes.

    tensors: those that it reads, by name.
    """
    nodes = {node.name: node for node in graph.nodes}
    old = nodes[one.node]
    write = _Writer(graph, old, tensors)
    before = {node.name for node in graph.nodes}
    params = dict(zip(one.params, old.args[2], strict=True))
    starts = [nodes[name] for name in one.start]
    x, ends = nodes[one.reads], [[] for _ in starts]  # type: ignore[var-annotated]  # nodes
    for layer, parts in enumerate(one.layers):
        given = []
        for part in parts:
            states = _open_direction(write, part, x, starts, params)
            given.append(states[0])
            for end, state in zip(ends, states[1:], strict=True):
                end.append(state)
        x = _joined(write, one, layer, given)
    val = [start.meta["val"] for start in starts]
    results = [x, *(write.call(aten.stack.default, (end,), v) for end, v in zip(ends, val, strict=True))]
    for name, place in one.given:
        with graph.inserting_before(old):
            _in_place_of(nodes[name], graph.call_function(aten.alias.default, (results[place],)))
    graph.erase_node(old)
    return replace(one, created=tuple(node.name for node in graph.nodes if node.name not in before))


def _in_place_of(old: fx.Node, new: fx.Node) -> None:
    """Let a node take the place, the meta data and the name of another one."""
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)
    new.name = old.name


def _open_direction(
    write: _Writer, part: Direction, x: fx.Node, starts: Sequence[fx.Node], params: Mapping[str, fx.Node]
) -> list[fx.Node]:
    """Write one loop; return its states, the last one, and of an LSTM the last memory."""
    weight, bias = params[part.input_weight], params.get(part.input_bias or "")
    like = x.meta["val"]
    rows = write.tensors[part.input_weight].shape[0]
    gates = write.call(aten.linear.default, (x, weight, bias), like.new_empty(*like.shape[:-1], rows), part.gates)
    tap = write.call(unseen, (gates,), gates.meta["val"], part.tap)
    names = ("hidden", "memory")[: len(starts)]
    state = [
        write.call(aten.select.int, (start, 0, part.place), start.meta["val"][part.place], f"{part.at}_{name}")
        for name, start in zip(names, starts, strict=True)
    ]
    projection = None
    if part.projection:
        with write.graph.inserting_before(write.at):
            projection = write.graph.create_node("get_attr", part.projection, (), {}, f"{part.at}_projection")
        projection.meta = dict(params[part.projection].meta)
    hidden = state[0].meta["val"]
    y = like.new_empty(*like.shape[:-1], hidden.shape[-1])
    memory = state[1] if len(state) > 1 else None
    loop = write.call(
        recur,
        (gates, tap, state[0], memory, projection, params[part.hidden_weight], params.get(part.hidden_bias or ""),
         part.cell.kind, part.cell.batch_first, part.cell.reverse),
        (y, *(node.meta["val"] for node in state)),
        part.states,
    )  # fmt: skip
    values = [write.call(operator.getitem, (loop, i), v) for i, v in enumerate(loop.meta["val"])]
    write.call(previous, (values[0], state[0], part.cell.batch_first, part.cell.reverse), y, part.read)
    return values


def _joined(write: _Writer, one: Recurrent, layer: int, given: Sequence[fx.Node]) -> fx.Node:
    """Return what a layer gives: both directions beside each other, and dropout before a next layer."""
    value = given[0].meta["val"]
    whole = value.new_empty(*value.shape[:-1], len(given) * value.shape[-1])
    drops = one.dropout > 0 and layer < len(one.layers) - 1
    name = f"{one.node}_l{layer}"
    target, args = (aten.cat.default, (list(given), -1)) if len(given) > 1 else (aten.alias.default, (given[0],))
    x = write.call(target, args, whole, None if drops else name)
    return write.call(aten.dropout.default, (x, one.dropout, False), whole, name) if drops else x


def close_recurrent(graph: fx.Graph, one: Recurrent) -> Recurrent:
    """Put an operator back in the place of what it was written out as. Numbers stay."""
    nodes = {node.name: node for node in graph.nodes}
    place = nodes[one.created[0]]
    with graph.inserting_before(place):
        params = [graph.get_attr(name) for name in one.params]
        start = [nodes[name] for name in one.start]
        state = start if len(start) > 1 else start[0]
        made = graph.create_node("call_function", one.target, (nodes[one.reads], state, params, *one.flags), {}, one.node)
        results = [nodes[f"{one.node}_l{len(one.layers) - 1}"], *start]
        made.meta = {**results[0].meta, "val": [result.meta["val"] for result in results]}
        for name, i in one.given:
            _in_place_of(nodes[name], graph.call_function(operator.getitem, (made, i)))
    for name in reversed(one.created):
        erase_unused(graph, nodes[name])
    return replace(one, created=())


def nodes_inside(graph: fx.Graph, recurrent: Iterable[str]) -> set[fx.Node]:
    """Return the operators of these names, and the loops of dense weights."""
    names = set(recurrent)
    return {node for node in graph.nodes if node.name in names or node.target is recur}
