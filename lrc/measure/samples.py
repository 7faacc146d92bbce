"""Sums sample by sample, for what is squared or averaged within a sample before samples are added up.

A sample is one row of the batch dimension, the first one of the program's first input.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lrc.errors import SiteError
from lrc.measure.taps import Tap, rows_of, traced_sizes
from lrc.program import Program
from lrc.solvers import Need


class Magnitudes:
    """The running sum over samples of the mean over their tokens of |x|, float64, on the device of x."""

    def __init__(self, features: int) -> None:
        self.samples = 0
        self._total = torch.zeros(features, dtype=torch.float64)

    def add(self, sums: Tensor, tokens: Tensor) -> None:
        """Add samples: their sums of |x|, (samples, features), and of how many tokens, (samples,). Empty ones do not count."""
        seen = tokens > 0
        self._total = self._total.to(sums.device) + (sums[seen] / tokens[seen, None]).sum(0)
        self.samples += int(seen.sum())

    def mean(self) -> Tensor:
        """Return the mean over samples, (features,), float64."""
        return self._total / max(self.samples, 1)


class WeightFisher:
    """The running sum over samples of (dL/dW)², L the loss summed over a sample's tokens.

    dL/dW of one sample is a product in the dtype of x (float16 and bfloat16 in float32); its squares are added in float64.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self.samples = 0
        self._total = torch.zeros(shape, dtype=torch.float64)

    def add(self, x: Tensor, gradients: Tensor, owners: Tensor) -> None:
        """Add a batch: inputs (rows, in_features), dL/dy (rows, out_features) and the sample of each row, (rows,).

        Rows of one sample from several uses of the weight belong into one call: their gradients add up before they are
        squared. Another call with the same samples and other gradients (another draw) is averaged with the first.
        """
        if self._total.device != x.device:
            self._total = self._total.to(x.device)
        if x.dtype in (torch.float16, torch.bfloat16):
            x, gradients = x.float(), gradients.float()
        for sample in torch.unique(owners).tolist():  # one at a time: all together need a weight's memory for each
            mine = owners == sample
            self._total.add_((gradients[mine].T @ x[mine]).double().square_())
            self.samples += 1

    def mean(self) -> Tensor:
        """Return the mean over samples and draws, (out_features, in_features), float64."""
        return self._total / max(self.samples, 1)


class SampleSums:
    """What one walk over the batches adds up sample by sample: magnitudes and weight Fishers, where they are needed."""

    def __init__(self, program: Program, taps: Mapping[str, Sequence[Tap]], needs: frozenset[Need]) -> None:
        self._taps = taps
        for fqn in taps if needs & {Need.MAGNITUDES, Need.WEIGHT_FISHER} else ():
            refuse_other_kinds(fqn, program.sites[fqn].kind)
        self._placeholders = list(program.graph_module.graph.find_nodes(op="placeholder"))
        shapes = {fqn: program.sites[fqn].shape for fqn in taps}
        wanted = taps if Need.MAGNITUDES in needs else ()
        self._magnitudes = {reads_of(taps[fqn]): Magnitudes(shapes[fqn][1]) for fqn in wanted}
        wanted = taps if Need.WEIGHT_FISHER in needs else ()
        self._fishers = {fqn: WeightFisher(shapes[fqn]) for fqn in wanted}
        self.gradients = bool(self._fishers)
        self._names = {tap.reads: fqn for fqn in taps for tap in taps[fqn]} if self._magnitudes or self._fishers else {}
        self._count = 0
        self._size: Any = None  # the same as traced, most often a symbol
        self._owners: dict[fx.Node, Tensor] = {}
        self._masks: dict[fx.Node, Tensor | None] = {}
        self._sums: dict[fx.Node, tuple[Tensor, Tensor]] = {}

    def begin(self, values: Sequence[Tensor]) -> None:
        """Start a batch with the values of the program's inputs."""
        self._owners, self._sums = {}, {}
        for node, value in zip(self._placeholders, values, strict=True):
            if value.ndim:
                self._count, self._size = value.shape[0], traced_sizes(node, value)[0]
                return

    def see(self, node: fx.Node, value: Tensor, mask: Tensor | None) -> None:
        """Take note of what a site reads: the node's value, and its flat mask or None."""
        if node not in self._names:
            return
        owners = self._owners_of(node, value)
        self._owners[node] = owners = owners if mask is None else owners[mask]
        self._masks[node] = mask
        if self._magnitudes:
            rows = rows_of(value, mask)
            sums = torch.zeros(self._count, rows.shape[1], dtype=torch.float64, device=rows.device)
            sums.index_add_(0, owners, rows.abs().double())
            self._sums[node] = sums, owners.bincount(minlength=self._count)

    def add_gradients(self, seen: Mapping[fx.Node, Tensor], gradients: Mapping[fx.Node, Tensor]) -> None:
        """Add one draw: the values that the sites read, and the gradients at the unpadded rows that they gave."""
        for fqn, fisher in self._fishers.items():
            uses = self._taps[fqn]
            x = torch.cat([rows_of(seen[use.reads], self._masks[use.reads]) for use in uses])
            given = torch.cat([gradients[use.gives] for use in uses])
            fisher.add(x, given, torch.cat([self._owners[use.reads] for use in uses]))

    def end(self) -> None:
        """Finish a batch."""
        for reads, magnitudes in self._magnitudes.items():
            sums, tokens = zip(*(self._sums[node] for node in reads), strict=True)
            magnitudes.add(sum(sums[1:], sums[0]), sum(tokens[1:], tokens[0]))
        self._owners, self._sums = {}, {}

    def of(self, fqn: str) -> dict[str, Any]:
        """Return the means of a site, by the names of their fields in `Moments`."""
        found: dict[str, Any] = {}
        if self._magnitudes:
            found["magnitudes"] = self._magnitudes[reads_of(self._taps[fqn])].mean()
        if self._fishers:
            found["weight_fisher"] = self._fishers[fqn].mean()
        return found

    def _owners_of(self, node: fx.Node, value: Tensor) -> Tensor:
        """Return the sample that each row of a value belongs to, (rows,), int64. Raises SiteError where it has no samples."""
        places = torch.arange(self._count, device=value.device)
        leading: list[Any] = traced_sizes(node, value)[:-1]
        if self._size in leading:
            dim = leading.index(self._size)
            shape = [self._count if i == dim else 1 for i in range(len(leading))]
            return places.view(shape).expand(value.shape[:-1]).reshape(-1)
        if len(leading) == 1 and self._size is not None and leading[0] % self._size == 0:  # (batch * sequence, features)
            return places.repeat_interleave(value.shape[0] // max(self._count, 1))
        raise SiteError(
            self._names[node],
            expected="an input with a dimension that counts samples",
            got=f"shape {tuple(value.shape)} for {self._count} samples",
            hint="Name the site under `ignore`, or choose a solver that measures tokens, such as `whitened` or `kfac`",
        )


def reads_of(taps: Sequence[Tap]) -> tuple[fx.Node, ...]:
    """Return the distinct nodes that the uses of a site read, in order."""
    return tuple(dict.fromkeys(tap.reads for tap in taps))


def refuse_other_kinds(fqn: str, kind: str) -> None:
    """Raise SiteError for a site that is no linear."""
    if kind != "linear":
        raise SiteError(
            fqn,
            expected="a linear, for a solver that measures samples one by one",
            got=f"one of kind `{kind}`",
            hint="Name the site under `ignore`, or choose a solver that measures tokens, such as `whitened` or `kfac`",
        )
