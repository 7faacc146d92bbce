"""Calibration: one pass over the batches gives the moments of every site that was asked for."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from lrc.data import Batch, Batches
from lrc.errors import SiteError
from lrc.measure.cache import Cache
from lrc.measure.cotangents import Fisher, cotangent
from lrc.measure.samples import SampleSums, reads_of
from lrc.measure.second_moments import SecondMoment
from lrc.measure.stored import load_moments, store_moments
from lrc.measure.taps import Tap, padding_masks, placeholder_values, row_mask, rows_of, taps_of, traced_masks
from lrc.program import Program
from lrc.program.readout import readout
from lrc.solvers import Moments, Need

Progress = Callable[[int, int], None]


def collect(
    program: Program,
    batches: Batches,
    fqns: Iterable[str],
    needs: frozenset[Need],
    *,
    fisher: Fisher = "sampled",
    draws: int = 1,
    seed: int = 0,
    cache: Cache | None = None,
    key: str = "",
    progress: Progress | None = None,
) -> dict[str, Moments]:
    """Return the moments of the sites `fqns` that are needed, from one forward (for gradients also one backward) pass a batch.

    fisher: see `cotangents.cotangent`; draws: how many cotangents a batch, averaged. The random numbers of a batch come
    from `seed` and its place, so the result is the same for the same thread count. progress(done, total) counts batches.
    With a cache, what is stored under `key` (a digest of program, data and options) is read, not measured; what is
    measured is stored.

    Conventions: padding is not counted. Sites that read the same value share one gram. For a weight that is used more
    than once, `gram` and `mean` are means over the tokens of all uses (`tokens` counts them), `fisher` is the sum over
    uses: so 1/2 tr(fisher dW gram dWᵀ) is the increase of the loss a token for all uses together. For the same reason
    `fisher` of a site that sees one row a sample is divided by the tokens that the largest site sees. `weighted_gram` weighs
    every token by the squared norm of its gradient; it is left out where all gradients are zero. `weight_fisher` and
    `magnitudes` are means over samples (see `samples`), of the same gradients and tokens.
    The model's parameters and buffers are not changed. Raises SiteError for an unknown site or values that are not finite.
    """
    wanted = list(fqns)
    found = {} if cache is None else load_moments(cache, key, program, wanted)
    missing = [fqn for fqn in wanted if fqn not in found]
    if missing:
        walk = Walk(program, missing, needs)
        for done, batch in enumerate(batches):
            if progress is not None:
                progress(done, len(batches))
            walk.run(batch, fisher, draws, torch.Generator().manual_seed(seed * 1_000_003 + done))
        if progress is not None:
            progress(len(batches), len(batches))
        measured = walk.moments()
        if cache is not None:
            store_moments(cache, key, program, measured)
        found |= measured
    return {fqn: found[fqn] for fqn in wanted}


class Walk(fx.Interpreter):
    """Runs batches through the graph and adds up what the taps see."""

    def __init__(self, program: Program, fqns: Iterable[str], needs: frozenset[Need]) -> None:
        super().__init__(program.graph_module, garbage_collect_values=True)
        self.program = program
        self.backward = not needs.isdisjoint({Need.GRADIENTS, Need.WEIGHT_FISHER})
        self.taps: dict[str, tuple[Tap, ...]] = {fqn: taps_of(program, fqn) for fqn in fqns}
        every = [tap for taps in self.taps.values() for tap in taps]
        width = {fqn: program.sites[fqn].shape for fqn in self.taps}
        forward, backward = (every if need in needs else [] for need in (Need.INPUTS, Need.GRADIENTS))
        self.inputs = {tap.reads: SecondMoment(width[tap.fqn][1]) for tap in forward}
        self.outputs = {tap.gives: SecondMoment(width[tap.fqn][0]) for tap in backward}
        self.weighted = {tap.gives: SecondMoment(width[tap.fqn][1]) for tap in backward}
        self.samples = SampleSums(program, self.taps, needs)
        self.reads = {tap.gives: tap.reads for tap in every}
        self.read = set(self.reads.values())
        self.tokens = {tap.reads: 0 for fqn in program.sites for tap in taps_of(program, fqn)}
        self.in_place = any(_is_in_place(node) for node in program.graph_module.graph.nodes)
        self.traced = traced_masks(program)
        self.masks: dict[str, Tensor] = {}
        self.given: dict[fx.Node, Tensor] = {}
        self.seen: dict[fx.Node, Tensor] = {}

    def run(self, batch: Batch, fisher: Fisher, draws: int, generator: torch.Generator) -> None:  # type: ignore[override]
        """Add one batch."""
        self.masks = padding_masks(batch)
        self.given, self.seen = {}, {}
        values = placeholder_values(self.program, batch)
        self.samples.begin(values)
        with torch.set_grad_enabled(self.backward):
            outputs: Mapping[str, Tensor] = super().run(*values)
            if self.backward:
                self._backward(outputs, batch, fisher, draws, generator)
        self.samples.end()
        self.given, self.seen = {}, {}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; what a tap looks at is added, and given a gradient."""
        value = super().run_node(n)
        if n in self.tokens:
            self._see(n, value)
        if self.backward and n in self.reads:
            if not value.requires_grad:
                value = value.detach().requires_grad_()
            self.given[n] = value
            if self.in_place:  # what follows may overwrite the value, and the gradient would be that of what is there then
                value = value.clone()
        return value

    def _see(self, n: fx.Node, value: Tensor) -> None:
        mask = row_mask(n, value, self.masks, self.traced)
        rows = rows_of(value, mask)
        self.tokens[n] += len(rows)
        if n not in self.read:
            return
        if n in self.inputs:
            self.inputs[n].add(rows)
        self.samples.see(n, value, mask, rows)
        if self.backward:
            self.seen[n] = rows.clone() if self.in_place else rows

    def _backward(
        self, outputs: Mapping[str, Tensor], batch: Batch, fisher: Fisher, draws: int, generator: torch.Generator
    ) -> None:
        found = readout(outputs, batch, self.program.task)
        nodes = list(self.given)
        for draw in range(draws):
            sent = cotangent(found, batch, fisher, self.program.task, generator)
            gradients = torch.autograd.grad(
                found, [self.given[n] for n in nodes], sent, retain_graph=draw < draws - 1, allow_unused=True
            )
            rows = {node: self._rows(node, gradient) for node, gradient in zip(nodes, gradients, strict=True)}
            for node in self.outputs:
                self.outputs[node].add(rows[node], 1.0 / draws)
                self.weighted[node].add(self.seen[self.reads[node]], 1.0 / draws, rows[node].float().square().sum(1))
            self.samples.add_gradients(self.seen, rows)

    def _rows(self, node: fx.Node, gradient: Tensor | None) -> Tensor:
        """Return the unpadded rows of the gradient at a node; zeros where the output of interest does not depend on it."""
        if gradient is None:
            gradient = torch.zeros_like(self.given[node])
        return rows_of(gradient, row_mask(node, gradient, self.masks, self.traced))

    def moments(self) -> dict[str, Moments]:
        """Return the means; the same tensor for sites that read the same value."""
        tokens = max(self.tokens.values(), default=0)
        shared: dict[tuple[fx.Node, ...], Moments] = {}
        made = {}
        for fqn, taps in self.taps.items():
            reads = reads_of(taps)
            if reads not in shared:
                shared[reads] = self._means(fqn, reads)
            sampled: dict[str, Any] = {name: _finite(value, fqn, name) for name, value in self.samples.of(fqn).items()}
            made[fqn] = replace(shared[reads], **sampled)
            if self.outputs:
                made[fqn] = self._with_gradients(made[fqn], fqn, [tap.gives for tap in taps], tokens)
        return made

    def _with_gradients(self, moments: Moments, fqn: str, gives: Sequence[fx.Node], tokens: int) -> Moments:
        fisher = _finite(_added([self.outputs[node].total() for node in gives]) / max(tokens, 1), fqn, "output gradients")
        weight = sum(self.weighted[node].weight for node in gives)
        if weight == 0:
            return replace(moments, fisher=fisher)
        gram = _added([self.weighted[node].total() for node in gives]) / weight
        mean = _added([self.weighted[node].column_sum() for node in gives]) / weight
        return replace(moments, fisher=fisher, weighted_gram=gram, weighted_mean=mean)

    def _means(self, fqn: str, reads: tuple[fx.Node, ...]) -> Moments:
        rows = sum(self.tokens[node] for node in reads)
        if not self.inputs:
            return Moments(tokens=rows)
        gram = _added([self.inputs[node].total() for node in reads])
        mean = _added([self.inputs[node].column_sum() for node in reads])
        return Moments(gram=_finite(gram / max(rows, 1), fqn, "inputs"), mean=mean / max(rows, 1), tokens=rows)


def _added(tensors: Sequence[Tensor]) -> Tensor:
    return sum(tensors[1:], tensors[0])


def _is_in_place(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _finite(value: Tensor, fqn: str, what: str) -> Tensor:
    if not bool(torch.isfinite(value).all()):
        raise SiteError(
            fqn,
            expected=f"finite {what} on the calibration data",
            got="NaN or infinite ones",
            hint="Load the model as float32 (`model.dtype: float32`), or check the calibration data",
        )
    return value
