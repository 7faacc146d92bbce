"""Where a graph can be cut so that the activations of one block at a time are held: between its repeated parts."""

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, fx

from lrc.measure.taps import taps_of
from lrc.measure.workload import Shapes, bound_sizes
from lrc.program import Program
from lrc.program.linears import VIEWS

aten = torch.ops.aten
FREE = VIEWS | {
    aten.transpose.int, aten.permute.default, aten.t.default, aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default,
    aten.slice.Tensor, aten.select.int, aten.detach.default, aten.alias.default,
}  # fmt: skip


def segments(program: Program) -> list[list[fx.Node]]:
    """Return the nodes of the graph in order, cut between the blocks that repeat; one list where nothing does.

    Blocks are found by the shapes of the sites in graph order: the period that explains most of them. A cut is where the
    fewest numbers are alive between two blocks, before the first one and behind the last one.
    """
    nodes = list(program.graph_module.graph.nodes)
    order = {node: place for place, node in enumerate(nodes)}
    taps = sorted((tap for fqn in program.sites for tap in taps_of(program, fqn)), key=lambda tap: order[tap.gives])
    start, period, count = repeated([(tap.layout.kind, tap.shape) for tap in taps])
    if count < 2 or any(site.looped for site in program.sites.values()):
        return [nodes]
    alive = numbers_alive(nodes, order)
    places = []
    for first in range(start, start + period * count + 1, period):
        low = order[taps[first - 1].gives] + 1 if first else 0
        high = order[taps[first].gives] if first < len(taps) else len(nodes) - 1
        if 0 < low <= high:
            places.append(min(range(low, high + 1), key=alive.__getitem__))
    edges = [0, *sorted(set(places)), len(nodes)]
    return [nodes[i:j] for i, j in pairwise(edges) if i < j]


def repeated(words: Sequence[object]) -> tuple[int, int, int]:
    """Return (start, period, count) of the longest stretch of a sequence that repeats itself; count 1 where none does.

    Of stretches of one length, the one with the shortest period, and then the first one.
    """
    best, longest = (0, max(len(words), 1), 1), 0
    for period in range(1, len(words) // 2 + 1):
        run = 0
        for place in range(len(words) - period):
            run = run + 1 if words[place] == words[place + period] else 0
            count = run // period + 1
            if count >= 2 and count * period > longest:
                first = place - run + 1
                best, longest = (first, period, count), count * period
    return best


def numbers_alive(nodes: Sequence[fx.Node], order: dict[fx.Node, int]) -> list[int]:
    """Return, for every place, how many numbers made before it are read there or later, sizes of symbols as traced."""
    changes = [0] * (len(nodes) + 1)
    for place, node in enumerate(nodes):
        if node.op in ("placeholder", "get_attr", "output") or not node.users:
            continue
        value = node.meta.get("val")
        size = prod(_hint(s) for s in value.shape) if isinstance(value, Tensor) else 1
        changes[place + 1] += size
        changes[max(order[user] for user in node.users) + 1] -= size
    found, total = [], 0
    for change in changes[:-1]:
        total += change
        found.append(total)
    return found


def activation_bytes(program: Program, shapes: Shapes) -> int:
    """Return about how many bytes a forward pass keeps for a backward one, at inputs of these shapes: all that it computes."""
    bound = bound_sizes(program, shapes)
    total = 0
    for node in program.graph_module.graph.nodes:
        value = node.meta.get("val")
        if node.op not in ("call_function", "call_module") or node.target in FREE or not isinstance(value, Tensor):
            continue
        if value.is_floating_point():
            sizes = (s.node.expr.subs(bound) if isinstance(s, torch.SymInt) else s for s in value.shape)
            numbers = prod(int(s) if str(s).isdigit() else 1 for s in sizes)
            total += numbers * value.element_size()
    return total


def _hint(size: int | torch.SymInt) -> int:
    """Return a size as a number: that of the example, where it is dynamic."""
    return size if isinstance(size, int) else int(size.node.hint or 1)
