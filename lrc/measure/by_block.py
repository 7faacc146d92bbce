"""Gradients block by block: of all that a batch computes, one block's activations are held at a time.

A forward pass without gradients keeps what is alive between blocks. Then, from the last block to the first, each is computed
again from there with gradients, and sends back what came from the block behind it. That costs one forward pass more.
Source: Chen et al. (2016), arXiv:1604.06174, with the cuts between repeated blocks.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from lrc.errors import UsageError
from lrc.measure.blocks import segments
from lrc.program import Program

if TYPE_CHECKING:
    from lrc.measure.collect import Walk

Values = dict[fx.Node, Any]
Send = Callable[[Mapping[str, Tensor]], tuple[list[Tensor], list[list[Tensor]]]]


class Blocks:
    """The blocks of a walk's graph. Raises UsageError where they cannot be computed a second time, or one by one."""

    def __init__(self, walk: "Walk", program: Program) -> None:
        if walk.in_place or walk.samples.gradients:
            what = (
                "the solver's statistics need a whole sample" if walk.samples.gradients else "the graph changes values in place"
            )
            raise UsageError("calibration.by_block", message=f"blocks cannot be computed again: {what}", hint="Set it to false")
        self.walk = walk
        self.segments = segments(program)
        self.carrying: set[fx.Node] = set()  # what gradients can reach
        for node in program.graph_module.graph.nodes:
            if node in walk.given_by or any(read in self.carrying for read in node.all_input_nodes):
                self.carrying.add(node)

    def run(self, values: Sequence[Tensor], send: Send) -> None:
        """Run a batch: everything is added as by one backward pass through the whole graph."""
        walk, kept = self.walk, []
        walk.args_iter = iter(values)
        alive: Values = {}
        walk.counting = True
        with torch.no_grad():
            for nodes in self.segments[:-1]:
                kept.append(dict(alive))
                self._advance(nodes, alive)
                walk.given, walk.seen = {}, {}
        kept.append(alive)
        arrived: list[Values] = []
        for nodes in reversed(self.segments):
            last = nodes is self.segments[-1]
            walk.counting = last
            walk.args_iter = iter(values)  # for the block that starts with them
            arrived = self._back(nodes, kept.pop(), arrived, send if last else None)
        walk.counting = True

    def _back(self, nodes: Sequence[fx.Node], before: Values, arrived: list[Values], send: Send | None) -> list[Values]:
        """Compute a block from what was alive before it, and send back; return the gradients before it, for every draw."""
        walk = self.walk
        leaves = {n: v.detach().requires_grad_() for n, v in before.items() if n in self.carrying and _differentiable(v)}
        alive = before | leaves
        walk.given = {}
        walk.seen = {n: v.detach() for n, v in before.items() if n in walk.read_by}
        walk.read |= {n: v.detach() for n, v in before.items() if n in walk.held}
        with torch.enable_grad():
            self._advance(nodes, alive)
            if send is not None:
                ends, sent = send(alive[nodes[-1]])
            else:
                reached = [n for n in arrived[0] if alive[n].requires_grad]
                ends, sent = [alive[n] for n in reached], [[draw[n] for n in reached] for draw in arrived]
            if not ends:
                return [{} for _ in sent]
            found = walk._backward(ends, sent, list(leaves.values()))
        return [{n: g for n, g in zip(leaves, draw, strict=True) if g is not None} for draw in found]

    def _advance(self, nodes: Sequence[fx.Node], alive: Values) -> None:
        """Run nodes, and forget what none behind them reads."""
        self.walk.env = alive
        for node in nodes:
            alive[node] = self.walk.run_node(node)
            for dead in self.walk.user_to_last_uses.get(node, []):
                alive.pop(dead, None)


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
