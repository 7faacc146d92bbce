"""Showing the rows that sites read to whatever wants to see them, batch by batch."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from lrc.data import Batch
from lrc.measure.taps import Tap, padding_masks, pieces, placeholder_values, tap_mask, taps_of, traced_masks
from lrc.program import Program


class Seeing(Protocol):
    """What looks at rows, (rows, in_features); `done` says that it needs no more."""

    @property
    def done(self) -> bool:
        """Whether it needs no more."""

    def see(self, rows: Tensor) -> None:
        """Look at the unpadded rows of a batch."""


def observe(program: Program, batches: Iterable[Batch], observers: Mapping[str, Seeing], *, rounds: int = 1) -> None:
    """Run batches through the program and show every observer what its site reads, by site.

    One observer may stand for several sites that read the same value: it is shown that once. The batches are run `rounds`
    times, or until every observer is done. For a site that is used more than once, it sees the rows of every use.
    """
    walk = Watch(program, observers)
    for _ in range(rounds):
        for batch in batches:
            if all(observer.done for observer in observers.values()):
                return
            walk.batch(batch)


class Watch(fx.Interpreter):
    """Runs batches through the graph and hands on what the taps read."""

    def __init__(self, program: Program, observers: Mapping[str, Seeing]) -> None:
        super().__init__(program.graph_module, garbage_collect_values=True)
        self.program = program
        self.traced = traced_masks(program)
        self.masks: dict[str, Tensor] = {}
        self.watched: dict[fx.Node, list[tuple[Tap, Seeing]]] = {}
        known: set[tuple[fx.Node, int]] = set()
        for fqn, observer in observers.items():
            for tap in taps_of(program, fqn):
                if (tap.reads, id(observer)) not in known:
                    known.add((tap.reads, id(observer)))
                    self.watched.setdefault(tap.reads, []).append((tap, observer))

    def batch(self, batch: Batch) -> None:
        """Run one batch."""
        self.masks = padding_masks(batch)
        with torch.no_grad():
            self.run(*placeholder_values(self.program, batch))

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, and show what it gives."""
        value = super().run_node(n)
        for tap, observer in self.watched.get(n, ()):
            if not observer.done:
                mask = tap_mask(tap, n, value, self.masks, self.traced)
                for piece in pieces(tap.layout, value, mask):
                    observer.see(piece.rows)
        return value
