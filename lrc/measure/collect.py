"""Calibration: one pass over the batches gives the moments of every site that was asked for."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from lrc.data import Batch, Batches
from lrc.errors import SiteError
from lrc.measure.by_block import Blocks
from lrc.measure.cache import Cache, digest
from lrc.measure.cotangents import Fisher, cotangent
from lrc.measure.joint import joint_moments, refuse_samples
from lrc.measure.samples import SampleSums
from lrc.measure.stored import StoredMoments
from lrc.measure.sums import Source, accumulator, add_output, add_piece, output_sums, source
from lrc.measure.taps import (
    Piece,
    Tap,
    padding_masks,
    pieces,
    placeholder_values,
    row_mask,
    rows_of,
    tap_mask,
    taps_of,
    traced_masks,
)
from lrc.program import Program
from lrc.program.loops import write_out
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
    by_block: bool = False,
) -> dict[str, Moments]:
    """Return the moments of the sites `fqns` that are needed, from one forward (for gradients also one backward) pass a batch.

    fisher: see `cotangents.cotangent`; draws: how many cotangents a batch, averaged. The random numbers of a batch come
    from `seed` and its place, so the result is the same for the same thread count. progress(done, total) counts batches.
    by_block: hold the activations of one block at a time for the backward pass, and compute them a second time (`by_block`).
    With a cache, what is stored under `key` (a digest of program and data) is read, not measured, whatever else was needed
    when it was; what is measured is stored.

    Conventions: padding is not counted. Sites that read the same value share one gram. For a weight that is used more
    than once, `gram` and `mean` are means over the tokens of all uses (`tokens` counts them), `fisher` is the sum over
    uses: so 1/2 tr(fisher dW gram dWᵀ) is the increase of the loss a token for all uses together. For the same reason
    `fisher` of a site that sees one row a sample is divided by the tokens that the largest site sees. `weighted_gram` weighs
    every token by the squared norm of its gradient; it is left out where all gradients are zero. `weight_fisher` and
    `magnitudes` are means over samples (see `samples`), of the same gradients and tokens.
    The model's parameters and buffers are not changed. Raises SiteError for an unknown site or values that are not finite.
    """
    wanted = list(fqns)
    stored = None if cache is None else StoredMoments(cache, key, digest(fisher, draws, seed), program, needs)
    found = {} if stored is None else stored.load(wanted)
    missing = [fqn for fqn in wanted if fqn not in found]
    if missing:
        write_out(program, missing)
        walk = Walk(program, missing, needs, by_block=by_block)
        for done, batch in enumerate(batches):
            if progress is not None:
                progress(done, len(batches))
            walk.run(batch, fisher, draws, torch.Generator().manual_seed(seed * 1_000_003 + done))
        if progress is not None:
            progress(len(batches), len(batches))
        measured = walk.moments()
        if stored is not None:
            stored.store(measured)
        found |= measured
    return {fqn: found[fqn] for fqn in wanted}


class Walk(fx.Interpreter):
    """Runs batches through the graph and adds up what the taps see."""

    def __init__(self, program: Program, fqns: Iterable[str], needs: frozenset[Need], *, by_block: bool = False) -> None:
        super().__init__(program.graph_module, garbage_collect_values=True)
        self.program = program
        self.backward = not needs.isdisjoint({Need.GRADIENTS, Need.WEIGHT_FISHER})
        self.taps: dict[str, tuple[Tap, ...]] = {fqn: taps_of(program, fqn) for fqn in fqns}
        every = [tap for taps in self.taps.values() for tap in taps]
        refuse_samples([program.sites[fqn] for fqn in self.taps], needs)
        joint = {fqn for fqn in self.taps if program.sites[fqn].joint}
        forward, backward = (every if need in needs else [] for need in (Need.INPUTS, Need.GRADIENTS))
        self.inputs = {source(tap): accumulator(tap) for tap in forward}
        self.outputs = {tap.gives: output_sums(tap, joint=tap.fqn in joint) for tap in backward}
        self.weighted = {tap.gives: accumulator(tap) for tap in backward if tap.fqn not in joint}
        self.samples = SampleSums(program, self.taps, needs)
        self.given_by = {tap.gives: tap for tap in every}
        self.read_by: dict[fx.Node, dict[Source, Tap]] = {}
        order = {node: place for place, node in enumerate(program.graph_module.graph.nodes)}
        for tap in every:
            last = max([tap.reads, *(node for _, node in tap.context)], key=order.__getitem__)
            self.read_by.setdefault(last, {})[source(tap)] = tap
        self.held = {node for tap in every if tap.context for node in (tap.reads, *(node for _, node in tap.context))}
        self.counted = {tap.gives: tap.layout for fqn in program.sites for tap in taps_of(program, fqn)}
        self.tokens = dict.fromkeys(self.counted, 0)
        self.in_place = changes_in_place(program)
        self.traced = traced_masks(program)
        self.masks: dict[str, Tensor] = {}
        self.given: dict[fx.Node, Tensor] = {}
        self.seen: dict[fx.Node, Tensor] = {}
        self.counting = True  # off where a block is computed again
        self.blocks = Blocks(self, program) if by_block and self.backward else None
        self.read: dict[fx.Node, Tensor] = {}  # of uses that read several values, until the last one is there

    def run(self, batch: Batch, fisher: Fisher, draws: int, generator: torch.Generator) -> None:  # type: ignore[override]
        """Add one batch."""
        self.masks = padding_masks(batch)
        self.given, self.seen = {}, {}
        values = placeholder_values(self.program, batch)
        self.samples.begin(values)
        send = partial(self._send, batch=batch, fisher=fisher, draws=draws, generator=generator)
        if self.blocks is not None:
            self.blocks.run(values, send)
        else:
            with torch.set_grad_enabled(self.backward):
                outputs: Mapping[str, Tensor] = super().run(*values)
                if self.backward:
                    self._backward(*send(outputs))
        self.samples.end()
        self.given, self.seen, self.read = {}, {}, {}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; what a tap looks at is added, and given a gradient."""
        value = super().run_node(n)
        if n in self.held:
            self.read[n] = value.detach()
        if n in self.read_by:
            self._see(n, value.detach())
        if n in self.counted and self.counting:
            outputs = self.counted[n].outputs(value)
            mask = row_mask(n, outputs, self.masks, self.traced)
            self.tokens[n] += outputs[..., 0].numel() if mask is None else int(mask.sum())
        if self.backward and n in self.given_by:
            if not value.requires_grad:
                value = value.detach().requires_grad_()
            self.given[n] = value
            if self.in_place:  # what follows may overwrite the value, and the gradient would be that of what is there then
                value = value.clone()
        return value

    def _see(self, n: fx.Node, value: Tensor) -> None:
        for key, tap in self.read_by[n].items() if self.counting else ():
            if key in self.inputs:
                for piece in self._pieces(tap, value if n is tap.reads else self.read[tap.reads]):
                    add_piece(self.inputs[key], piece)
            if n is tap.reads:
                self.samples.see(tap, value, self.mask_of(tap, n, value))
        if self.backward:
            self.seen[n] = value.clone() if self.in_place else value

    def _pieces(self, tap: Tap, value: Tensor) -> Iterator[Piece]:
        """Yield the rows of what a tap reads."""
        context = {name: self.read[node] for name, node in tap.context}
        yield from pieces(tap.layout, value, self.mask_of(tap, tap.reads, value), tap.shape[1], context)

    def mask_of(self, tap: Tap, node: fx.Node, value: Tensor) -> Tensor | None:
        """Return which rows of what a tap reads, or gives, are no padding; None for all."""
        return tap_mask(tap, node, value, self.masks, self.traced)

    def _send(
        self, outputs: Mapping[str, Tensor], *, batch: Batch, fisher: Fisher, draws: int, generator: torch.Generator
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Return the output of interest, and for every draw what is sent back from it."""
        found = readout(outputs, batch, self.program.task)
        return [found], [[cotangent(found, batch, fisher, self.program.task, generator)] for _ in range(draws)]

    def _backward(
        self, ends: list[Tensor], sent: list[list[Tensor]], leaves: Sequence[Tensor] = ()
    ) -> list[tuple[Tensor | None, ...]]:
        """Send every draw back from `ends`, add what the taps see, and return the gradients at the leaves for each."""
        nodes = list(self.given)
        at_leaves: list[tuple[Tensor | None, ...]] = []
        for draw, cotangents in enumerate(sent):
            values = [*(self.given[n] for n in nodes), *leaves]
            keep = draw < len(sent) - 1
            gradients = torch.autograd.grad(ends, values, cotangents, retain_graph=keep, allow_unused=True)
            rows = {node: self._rows(node, gradient) for node, gradient in zip(nodes, gradients, strict=False)}
            for node in nodes:
                self._add_gradient(self.given_by[node], rows[node], 1.0 / len(sent))
            self.samples.add_gradients(self.seen, rows)
            at_leaves.append(gradients[len(nodes) :])
        return at_leaves

    def _rows(self, node: fx.Node, gradient: Tensor | None) -> Tensor:
        """Return the unpadded rows of the gradient at a node; zeros where the output of interest does not depend on it."""
        if gradient is None:
            gradient = torch.zeros_like(self.given[node])
        tap = self.given_by[node]
        return rows_of(tap.layout.outputs(gradient), self.mask_of(tap, node, gradient))

    def _add_gradient(self, tap: Tap, rows: Tensor, weight: float) -> None:
        if tap.gives not in self.outputs:
            return
        pieces = partial(self._pieces, tap, self.read[tap.reads] if tap.context else self.seen[tap.reads])
        add_output(self.outputs[tap.gives], rows, weight, pieces)
        if tap.gives not in self.weighted:
            return
        squares = rows.float().square().sum(1)
        for piece in pieces():
            add_piece(self.weighted[tap.gives], piece, weight, squares)

    def moments(self) -> dict[str, Moments]:
        """Return the means; the same tensor for sites that read the same value. Called once: sums go as they are read."""
        with_gradients = bool(self.outputs)
        tokens = max(self.tokens.values(), default=0)
        shared: dict[tuple[Source, ...], Moments] = {}
        made = {}
        for fqn, taps in self.taps.items():
            if self.program.sites[fqn].joint:
                made[fqn] = self._joint(fqn, taps, max(tokens, 1))
                continue
            reads = tuple(dict.fromkeys(source(tap) for tap in taps))
            if reads not in shared:
                shared[reads] = self._means(fqn, reads, taps)
            sampled: dict[str, Any] = {name: _finite(value, fqn, name) for name, value in self.samples.of(fqn).items()}
            made[fqn] = replace(shared[reads], **sampled)
            if with_gradients:
                made[fqn] = self._with_gradients(made[fqn], fqn, [tap.gives for tap in taps], tokens)
        return made

    def _with_gradients(self, moments: Moments, fqn: str, gives: Sequence[fx.Node], tokens: int) -> Moments:
        fisher = _finite(_added([self.outputs.pop(node).total() for node in gives]) / max(tokens, 1), fqn, "output gradients")
        weighted = [self.weighted.pop(node) for node in gives]
        weight = sum(sums.weight for sums in weighted)
        if weight == 0:
            return replace(moments, fisher=fisher)
        gram = _added([sums.total() for sums in weighted]) / weight
        mean = _added([sums.column_sum() for sums in weighted]) / weight
        return replace(moments, fisher=fisher, weighted_gram=gram, weighted_mean=mean)

    def _joint(self, fqn: str, taps: Sequence[Tap], tokens: int) -> Moments:
        """Return the moments of a weight that heads multiply and embeddings look up."""
        heads, tables = [tap for tap in taps if not tap.layout.looked_up], [tap for tap in taps if tap.layout.looked_up]
        found = self._means(fqn, tuple(dict.fromkeys(source(tap) for tap in heads)), heads)
        if found.gram is None or found.mean is None:
            return found
        squares = counts = gradients = None
        if self.outputs:
            squares, gradients = (
                _finite(_added([self.outputs[tap.gives].total() for tap in some]) / tokens, fqn, "output gradients")
                for some in (heads, tables)
            )
            counts = _added([self.inputs[source(tap)].total() for tap in tables]) / tokens
        return joint_moments((found.gram, found.mean), found.tokens, squares, counts, gradients)

    def _means(self, fqn: str, reads: tuple[Source, ...], taps: Sequence[Tap]) -> Moments:
        if not self.inputs:
            return Moments(tokens=sum(self.tokens[tap.gives] for tap in taps))
        rows = sum(self.inputs[key].rows for key in reads)
        gram = _added([self.inputs[key].total() for key in reads])
        mean = _added([self.inputs[key].column_sum() for key in reads])
        return Moments(gram=_finite(gram / max(rows, 1), fqn, "inputs"), mean=mean / max(rows, 1), tokens=rows)


def _added(tensors: Sequence[Tensor]) -> Tensor:
    return sum(tensors[1:], tensors[0])


def changes_in_place(program: Program) -> bool:
    """Say whether an operation of the graph overwrites a value."""
    return any(is_in_place(node) for node in program.graph_module.graph.nodes)


def is_in_place(node: fx.Node) -> bool:
    """Say whether an operation overwrites what it is given."""
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
