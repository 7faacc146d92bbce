"""The mean gradient of the loss with respect to whole weights, some weights at a time."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx

from lrc.data import Batch
from lrc.measure.collect import is_in_place
from lrc.measure.cotangents import Fisher, cotangent, has_classes
from lrc.measure.taps import Tap, pieces, placeholder_values, rows_of, taps_of
from lrc.program import Program
from lrc.program.readout import readout

Loss = Literal["auto", "labels", "sampled", "outputs"]


def mean_gradients(
    program: Program, batches: Iterable[Batch], fqns: Sequence[str], *, loss: Fisher, seed: int = 0
) -> dict[str, Tensor]:
    """Return the mean over batches of dL/dW, (out_features, in_features) float32 each, L the mean loss over a batch's rows.

    loss: see `cotangents.cotangent`. No weight needs a gradient of its own: dL/dW is the product of what a site reads and of
    the gradient at what it gives, formed for one site after the other. So no more is held than the `fqns`' own gradients and
    one batch's activations. The model is not changed, and runs in eval mode.
    """
    walk = Backward(program, fqns)
    count = 0
    for count, batch in enumerate(batches, 1):
        walk.batch(batch, loss, torch.Generator().manual_seed(seed * 1_000_003 + count - 1))
    return {fqn: total / max(count, 1) for fqn, total in walk.totals.items()}


def in_memory(program: Program, fqns: Sequence[str], most: int) -> Iterator[list[str]]:
    """Split sites into groups whose gradients take at most `most` bytes together, at least one site each, in order."""
    group: list[str] = []
    held = 0
    for fqn in fqns:
        size = 4 * program.sites[fqn].out_features * program.sites[fqn].in_features
        if group and held + size > most:
            yield group
            group, held = [], 0
        group.append(fqn)
        held += size
    if group:
        yield group


def settled_loss(loss: Loss, task: str | None, batch: Mapping[str, Any]) -> Fisher:
    """Return the loss that there is: `labels` where the task has them, else one drawn from the model's own distribution."""
    if loss != "auto":
        return loss
    labelled = task == "text-generation" or ("labels" in batch and has_classes(task))
    return "labels" if labelled else "sampled"


class Backward(fx.Interpreter):
    """Runs batches forward and back, and adds up gradients of weights."""

    def __init__(self, program: Program, fqns: Sequence[str]) -> None:
        super().__init__(program.graph_module, garbage_collect_values=True)
        self.program = program
        self.totals = {fqn: torch.zeros(program.sites[fqn].shape) for fqn in fqns}
        taps = [tap for fqn in fqns for tap in taps_of(program, fqn)]
        self.given_by: dict[fx.Node, Tap] = {tap.gives: tap for tap in taps}
        self.reads = {tap.reads for tap in taps}
        self.in_place = any(is_in_place(node) for node in program.graph_module.graph.nodes)
        self.given: dict[fx.Node, Tensor] = {}
        self.seen: dict[fx.Node, Tensor] = {}

    def batch(self, batch: Batch, loss: Fisher, generator: torch.Generator) -> None:
        """Add one batch."""
        self.given, self.seen = {}, {}
        with torch.enable_grad():
            outputs: Mapping[str, Tensor] = self.run(*placeholder_values(self.program, batch))
            found = readout(outputs, batch, self.program.task)
            sent = cotangent(found, batch, loss, self.program.task, generator)
            counted = int(sent.reshape(-1, sent.shape[-1]).any(1).sum())
            nodes = [node for node in self.given if self.given[node].requires_grad]
            gradients = torch.autograd.grad(found, [self.given[n] for n in nodes], sent / max(counted, 1), allow_unused=True)
        for node, gradient in zip(nodes, gradients, strict=True):
            if gradient is not None:
                self._add(self.given_by[node], gradient)
        self.given, self.seen = {}, {}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; what a site reads is kept, what it gives gets a gradient."""
        value = super().run_node(n)
        if n in self.reads:
            self.seen[n] = value.detach().clone() if self.in_place else value.detach()
        if n in self.given_by:
            if not value.requires_grad:
                value = value.detach().requires_grad_()
            self.given[n] = value
            if self.in_place:
                value = value.clone()
        return value

    def _add(self, tap: Tap, gradient: Tensor) -> None:
        rows = rows_of(tap.layout.outputs(gradient), None).float()
        total = self.totals[tap.fqn] = self.totals[tap.fqn].to(rows.device)
        value = self.seen[tap.reads]
        if tap.layout.kind == "embedding":
            total.T.index_add_(0, value.reshape(-1), rows)
            return
        for piece in pieces(tap.layout, value, None):
            total.addmm_(rows[piece.place].T, piece.rows.float())
