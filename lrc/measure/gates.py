"""Gradients of the loss with respect to gates of ones on the channels that sites read, row by row."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lrc.data import Batch
from lrc.measure.cotangents import Fisher, cotangent
from lrc.measure.taps import Tap, placeholder_values, taps_of
from lrc.program import Program
from lrc.program.dependency import Group
from lrc.program.dependency.labels import Array
from lrc.program.readout import readout


def gate_gradients(
    program: Program, batches: Iterable[Batch], fqns: Sequence[str], *, loss: Fisher, seed: int = 0
) -> Iterator[Mapping[str, Tensor]]:
    """Yield dL/dgate of every batch, (rows, channels) float32 by site, L the loss summed over the batch.

    A site reads its input times gates of ones: a linear one for every feature of every row, a convolution one for every channel
    of every image. The gates of several uses add up. Less the gradient is, in first order, what the loss changes by without
    what the row gives to the site. loss: see `cotangents.cotangent`. The model is not changed, and runs in eval mode.
    """
    walk = Gated(program, fqns)
    for count, batch in enumerate(batches):
        yield walk.batch(batch, loss, torch.Generator().manual_seed(seed * 1_000_003 + count))


def by_gates(groups: Sequence[Group], batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the sums over all rows of the squares of what the loss changes by, in first order, without a unit in that row.

    batches: gradients of gates, (rows, channels) by site. The sites that read a unit act together where they have the same
    rows; over others (images here, positions there) squares are added.
    """
    totals = {group.name: torch.zeros(group.units, dtype=torch.float64) for group in groups}
    for gradients in batches:
        for group in groups:
            changes: dict[int, Tensor] = {}
            for fqn, index in readers(group):
                found = gradients[fqn].double()[:, torch.from_numpy(index)].sum(-1).cpu()
                changes[len(found)] = changes.get(len(found), 0) + found
            for change in changes.values():
                totals[group.name] += change.square().sum(0)
    return totals


def readers(group: Group) -> list[tuple[str, Array]]:
    """Return the sites that read a group's units, and where."""
    return [(m.slot[1], m.index) for m in group.members if m.site is not None and m.slot[2] == "in"]


class Gated(fx.Interpreter):
    """Runs batches forward and back with gates of ones."""

    def __init__(self, program: Program, fqns: Sequence[str]) -> None:
        super().__init__(program.graph_module, garbage_collect_values=True)
        self.program = program
        self.taps: dict[fx.Node, Tap] = {tap.gives: tap for fqn in fqns for tap in taps_of(program, fqn)}
        self.gates: dict[fx.Node, Tensor] = {}

    def batch(self, batch: Batch, loss: Fisher, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the gradients of one batch."""
        self.gates = {}
        with torch.enable_grad():
            found = readout(self.run(*placeholder_values(self.program, batch)), batch, self.program.task)
            sent = cotangent(found, batch, loss, self.program.task, generator)
            gradients = torch.autograd.grad(found, list(self.gates.values()), sent, allow_unused=True)
        sums: dict[str, Tensor] = {}
        for (node, gate), gradient in zip(self.gates.items(), gradients, strict=True):
            tap = self.taps[node]
            flat = (torch.zeros_like(gate) if gradient is None else gradient).float()
            flat = flat.reshape(-1, gate.shape[channel_of(tap, gate)])
            sums[tap.fqn] = sums[tap.fqn] + flat if tap.fqn in sums else flat
        self.gates = {}
        return sums

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; a site reads its input through gates."""
        tap = self.taps.get(n)
        if tap is None:
            return super().run_node(n)
        value = self.env[tap.reads]
        shape = value.shape if tap.layout.kind != "conv" else (*value.shape[:2], *(1 for _ in value.shape[2:]))
        self.gates[n] = torch.ones(shape, dtype=value.dtype, device=value.device, requires_grad=True)
        self.env[tap.reads] = value * self.gates[n]
        try:
            return super().run_node(n)
        finally:
            self.env[tap.reads] = value


def channel_of(tap: Tap, value: Tensor) -> int:
    """Return the dimension of a site's input that its channels are in."""
    return 1 if tap.layout.kind == "conv" else value.ndim - 1
