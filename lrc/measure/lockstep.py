"""Two programs walked side by side: the dense one, and the one whose earlier sites are compressed already."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from lrc.data import Batch, Batches
from lrc.maps import Layout
from lrc.measure.grouped import GroupedCross, GroupedMoment
from lrc.measure.second_moments import CrossMoment, SecondMoment
from lrc.measure.taps import Tap, padding_masks, pieces, placeholder_values, tap_mask, taps_of, traced_masks
from lrc.program import Program
from lrc.program.loops import write_out
from lrc.solvers import Moments


class Stepper:
    """One program on one batch, run node by node; only values that later nodes read are held.

    The graph may change between steps beyond what has run: nodes are told apart by name.
    """

    def __init__(self, program: Program, batch: Batch) -> None:
        self.program = program
        self.values: dict[str, Any] = {}
        self.done: set[str] = set()
        self._inputs = iter(placeholder_values(program, batch))

    def advance_to(self, name: str) -> Tensor:
        """Run every node up to the one called `name`, and return its value."""
        module = self.program.graph_module
        runner = fx.Interpreter(module)
        nodes = {node.name: node for node in module.graph.nodes}
        for node in module.graph.nodes:
            if name in self.done:
                break
            if node.name in self.done:
                continue
            self.values[node.name] = self._run(runner, node)
            self.done.add(node.name)
        for held in list(self.values):
            node = nodes.get(held)
            spent = node is None or all(user.name in self.done for user in node.users)
            if spent and held != name:
                del self.values[held]
        value: Tensor = self.values[name]
        return value

    def _run(self, runner: fx.Interpreter, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return next(self._inputs)
        runner.env = {read: self.values[read.name] for read in node.all_input_nodes}
        return runner.run_node(node)


class Lockstep:
    """Moments of the inputs that a site really sees behind compressed sites, and their product with the dense inputs."""

    def __init__(self, dense: Program, compressed: Program, batches: Batches) -> None:
        if dense.recurrent:
            dense = dense.clone()
            write_out(dense)
        self.dense = dense
        self.batches = batches
        self._dense = [Stepper(dense, batch) for batch in batches]
        self._compressed = [Stepper(compressed, batch) for batch in batches]
        self._seen: dict[tuple[str, Layout], Moments] = {}

    @torch.no_grad()
    def advance_to(self, fqn: str, dense_moments: Moments) -> Moments:
        """Return the site's moments: `gram` and `mean` of the compressed inputs, `cross` and `dense_mean` with the dense ones.

        Gradients are those of `dense_moments`. Must be called in graph order. A site that is used more than once is fitted
        on its first use.
        """
        tap = taps_of(self.dense, fqn)[0]
        apart = tap.layout.kind == "experts" or self.dense.sites[fqn].looped  # routes differ; states are known after the loop
        if tap.layout.looked_up or apart:  # no index changes
            return dense_moments
        key = (tap.reads.name, tap.layout)
        if key not in self._seen:
            self._seen = {key: self._measure(tap, self.dense.sites[fqn].in_features)}
        return replace(self._seen[key], fisher=dense_moments.fisher)

    def _measure(self, tap: Tap, features: int) -> Moments:
        reads, layout = tap.reads, tap.layout
        gram: SecondMoment | GroupedMoment = SecondMoment(features)
        cross: CrossMoment | GroupedCross = CrossMoment(features)
        if layout.groups > 1:
            gram, cross = GroupedMoment(layout.groups, features), GroupedCross(layout.groups, features)
        traced = traced_masks(self.dense)
        steppers: Iterable[tuple[Batch, Stepper, Stepper]] = zip(self.batches, self._dense, self._compressed, strict=True)
        for batch, dense, compressed in steppers:
            x, seen = dense.advance_to(reads.name), compressed.advance_to(reads.name)
            mask = tap_mask(tap, reads, x, padding_masks(batch), traced)
            for left, right in zip(pieces(layout, x, mask), pieces(layout, seen, mask), strict=True):
                gram.add(right.rows)
                cross.add(left.rows, right.rows)
        rows = max(gram.rows, 1)
        return Moments(
            gram=gram.total() / rows,
            mean=gram.column_sum() / rows,
            cross=cross.total / rows,
            dense_mean=cross.left_sum / rows,
            tokens=gram.rows,
        )
