"""Sums sample by sample, for what is squared or averaged within a sample before samples are added up.

A sample is one row of the batch dimension, the first one of the program's first input.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from lrc.errors import SiteError
from lrc.maps import Layout
from lrc.measure.sums import Source, source
from lrc.measure.taps import Piece, Tap, pieces, rows_of, traced_sizes
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
    """The running sum over samples of (dL/dW)², L the loss summed over a sample's tokens, float64, in the shape of the matrix.

    dL/dW of one sample is a product in the dtype of x (float16 and bfloat16 in float32); its squares are added in float64.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self.samples = 0
        self._total = torch.zeros(shape, dtype=torch.float64)

    def add(self, uses: Sequence["Seen"], gradients: Sequence[Tensor]) -> None:
        """Add a batch: what every use of the weight has read, and dL/dy of its rows, (rows, out_features).

        The gradients of several uses add up before they are squared. Another call with the same samples and other gradients
        (another draw) is averaged with the first.
        """
        if self._total.device != gradients[0].device:
            self._total = self._total.to(gradients[0].device)
        given = [g.float() if g.dtype in (torch.float16, torch.bfloat16) else g for g in gradients]
        owners = torch.cat([use.owners for use in uses])
        if uses[0].tap.layout.looked_up:
            self._add_rows(torch.cat([use.rows() for use in uses])[:, 0], torch.cat(given), owners, uses[0].tap.layout)
            return
        for sample in torch.unique(owners).tolist():  # one at a time: all together need a weight's memory for each
            products = [use.product(g, sample) for use, g in zip(uses, given, strict=True)]
            self._total.add_(sum(products[1:], products[0]).double().square_())
            self.samples += 1

    def _add_rows(self, ids: Tensor, gradients: Tensor, owners: Tensor, layout: Layout) -> None:
        """Add the gradients of a table, of which a sample has touched few rows; its padding row has none."""
        padding = getattr(layout, "padding_index", None)
        counted = torch.ones_like(ids, dtype=torch.bool) if padding is None else ids != padding
        for sample in torch.unique(owners).tolist():
            mine = (owners == sample) & counted
            touched, places = torch.unique(ids[mine], return_inverse=True)
            sums = gradients.new_zeros(len(touched), gradients.shape[1]).index_add_(0, places, gradients[mine])
            self._total[:, touched] += sums.double().square_().T
            self.samples += 1

    def mean(self) -> Tensor:
        """Return the mean over samples and draws, (out_features, in_features), float64."""
        return self._total / max(self.samples, 1)


@dataclass(frozen=True)
class Seen:
    """What one use of a site has read in a batch: the value, which of its rows are no padding, and their samples."""

    tap: Tap
    value: Tensor
    mask: Tensor | None
    owners: Tensor

    def rows(self) -> Tensor:
        """Return what was read as unpadded rows."""
        return rows_of(self.tap.layout.inputs(self.value), self.mask)

    def pieces(self) -> Iterator[Piece]:
        """Yield the rows, of images a few samples at a time."""
        yield from pieces(self.tap.layout, self.value, self.mask)

    def product(self, gradients: Tensor, sample: int) -> Tensor:
        """Return dL/dW of one sample, (out_features, in_features). gradients: dL/dy of all rows."""
        mine = gradients[self.owners == sample]
        if self.tap.layout.kind == "conv":
            rows = rows_of(self.tap.layout.inputs(self.value[sample : sample + 1]), None)
        else:
            rows = self.rows()[self.owners == sample]
        rows, blocks = rows.to(mine.dtype), self.tap.layout.groups
        if blocks == 1:
            return mine.T @ rows
        return torch.cat([g.T @ x for g, x in zip(mine.chunk(blocks, 1), rows.chunk(blocks, 1), strict=True)])


class SampleSums:
    """What one walk over the batches adds up sample by sample: magnitudes and weight Fishers, where they are needed."""

    def __init__(self, program: Program, taps: Mapping[str, Sequence[Tap]], needs: frozenset[Need]) -> None:
        self._taps = taps
        for fqn in taps if needs & {Need.MAGNITUDES, Need.WEIGHT_FISHER} else ():
            refuse_bags(fqn, program.sites[fqn].kind)
        self._placeholders = list(program.graph_module.graph.find_nodes(op="placeholder"))
        wanted = taps if Need.MAGNITUDES in needs else ()
        self._magnitudes = {reads_of(taps[fqn]): Magnitudes(_features(taps[fqn][0])) for fqn in wanted}
        wanted = taps if Need.WEIGHT_FISHER in needs else ()
        self._fishers = {fqn: WeightFisher(program.sites[fqn].shape) for fqn in wanted}
        self.gradients = bool(self._fishers)
        self._wanted = bool(self._magnitudes or self._fishers)
        self._count = 0
        self._size: Any = None  # the same as traced, most often a symbol
        self._seen: dict[Source, Seen] = {}
        self._sums: dict[Source, tuple[Tensor, Tensor]] = {}

    def begin(self, values: Sequence[Tensor]) -> None:
        """Start a batch with the values of the program's inputs."""
        self._seen, self._sums = {}, {}
        for node, value in zip(self._placeholders, values, strict=True):
            if value.ndim:
                self._count, self._size = value.shape[0], traced_sizes(node, value)[0]
                return

    def see(self, tap: Tap, value: Tensor, mask: Tensor | None) -> None:
        """Take note of what a site reads, and of the flat mask of its rows, or None."""
        if not self._wanted:
            return
        owners = self._owners_of(tap, value)
        seen = Seen(tap, value, mask, owners if mask is None else owners[mask])
        self._seen[source(tap)] = seen
        if self._magnitudes:
            self._sums[source(tap)] = self._sums_of(seen), seen.owners.bincount(minlength=self._count)

    def _sums_of(self, seen: Seen) -> Tensor:
        """Return every sample's sum over its rows of |x|, (samples, groups * in_features), float64."""
        sums = torch.zeros(self._count, _features(seen.tap), dtype=torch.float64, device=seen.value.device)
        if seen.tap.layout.looked_up:  # the rows are one-hot
            ones = torch.ones(len(seen.owners), dtype=torch.float64, device=sums.device)
            return sums.index_put_((seen.owners, seen.rows()[:, 0].long()), ones, accumulate=True)
        for piece in seen.pieces():
            sums.index_add_(0, seen.owners[piece.place], piece.rows.abs().double())
        return sums

    def add_gradients(self, values: Mapping[fx.Node, Tensor], gradients: Mapping[fx.Node, Tensor]) -> None:
        """Add one draw: the values that the sites read, and the gradients at the unpadded rows that they gave."""
        for fqn, fisher in self._fishers.items():
            uses = self._taps[fqn]
            seen = [replace(self._seen[source(use)], value=values[use.reads]) for use in uses]
            fisher.add(seen, [gradients[use.gives] for use in uses])

    def end(self) -> None:
        """Finish a batch."""
        for reads, magnitudes in self._magnitudes.items():
            sums, tokens = zip(*(self._sums[read] for read in reads), strict=True)
            magnitudes.add(sum(sums[1:], sums[0]), sum(tokens[1:], tokens[0]))
        self._seen, self._sums = {}, {}

    def of(self, fqn: str) -> dict[str, Any]:
        """Return the means of a site, by the names of their fields in `Moments`; of several groups, magnitudes one row each."""
        found: dict[str, Any] = {}
        if self._magnitudes:
            mean, groups = self._magnitudes[reads_of(self._taps[fqn])].mean(), self._taps[fqn][0].layout.groups
            found["magnitudes"] = mean if groups == 1 else mean.reshape(groups, -1)
        if self._fishers:
            found["weight_fisher"] = self._fishers[fqn].mean()
        return found

    def _owners_of(self, tap: Tap, value: Tensor) -> Tensor:
        """Return the sample that each row of what is read belongs to, (rows,), int64. Raises SiteError where there are none."""
        places = torch.arange(self._count, device=value.device)
        traced: list[Any] = traced_sizes(tap.reads, value)
        if tap.layout.kind == "conv":
            if traced[0] == self._size:
                positions = tap.layout.inputs(value[:1])[..., 0].numel() if len(value) else 0
                return places.repeat_interleave(positions)
            traced = [None, None]  # no dimension of it counts samples
        leading, sizes = (traced, value.shape) if tap.layout.looked_up else (traced[:-1], value.shape[:-1])
        if self._size in leading:
            dim = leading.index(self._size)
            shape = [self._count if i == dim else 1 for i in range(len(leading))]
            return places.view(shape).expand(sizes).reshape(-1)
        if (
            len(leading) == 1 and self._size is not None and leading[0] is not None and leading[0] % self._size == 0
        ):  # (batch * sequence, features)
            return places.repeat_interleave(value.shape[0] // max(self._count, 1))
        raise SiteError(
            tap.fqn,
            expected="an input with a dimension that counts samples",
            got=f"shape {tuple(value.shape)} for {self._count} samples",
            hint="Name the site under `ignore`, or choose a solver that measures tokens, such as `whitened` or `kfac`",
        )


def _features(tap: Tap) -> int:
    """Return how many numbers a row of what a tap reads has, of all groups."""
    return tap.layout.groups * tap.shape[1]


def reads_of(taps: Sequence[Tap]) -> tuple[Source, ...]:
    """Return what the uses of a site read and how, each once, in order."""
    return tuple(dict.fromkeys(source(tap) for tap in taps))


def refuse_bags(fqn: str, kind: str) -> None:
    """Raise SiteError for a site that reads bags, or rows of experts, which do not tell their samples."""
    if kind in ("embedding_bag", "experts"):
        raise SiteError(
            fqn,
            expected="a linear, a convolution or an embedding, for a solver that measures samples one by one",
            got=f"one of kind `{kind}`",
            hint="Name the site under `ignore`, or choose a solver that measures tokens, such as `whitened` or `kfac`",
        )
