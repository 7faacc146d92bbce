"""Second moments of a residual stream, at every place where a norm reads it."""

from typing import Any

import torch
from torch import Tensor, fx

from lrc.data import Batches
from lrc.errors import SiteError
from lrc.measure.second_moments import SecondMoment
from lrc.measure.taps import padding_masks, placeholder_values, row_mask, rows_of, traced_masks
from lrc.program import Program
from lrc.program.residual import Stream


def stream_moments(program: Program, stream: Stream, batches: Batches, *, normalized: bool) -> list[Tensor]:
    """Return E[x xᵀ] over unpadded tokens of what every norm reads, (width, width), float64, in the order of the norms.

    Where norms take a mean off, it is off here too. normalized: every token counts as the norm gives it, with length
    sqrt(width), so that the few tokens of a large norm do not outweigh the others. The program's numbers are not changed.
    """
    walk = _Walk(program, stream, normalized=normalized)
    with torch.no_grad():
        for batch in batches:
            walk.masks = padding_masks(batch)
            walk.run(*placeholder_values(program, batch))
    return walk.means()


class _Walk(fx.Interpreter):
    def __init__(self, program: Program, stream: Stream, *, normalized: bool) -> None:
        super().__init__(program.graph_module, garbage_collect_values=True)
        self.stream, self.normalized = stream, normalized
        self.moments = {norm.reads: SecondMoment(stream.width) for norm in stream.norms}
        self.norms = {norm.reads: norm for norm in stream.norms}
        self.traced = traced_masks(program)
        self.masks: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.moments:
            norm = self.norms[n.name]
            rows = rows_of(value, row_mask(n, value, self.masks, self.traced))
            rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
            if norm.centers:
                rows = rows - rows.mean(1, keepdim=True)
            if self.normalized:
                rows = rows * torch.rsqrt(rows.square().mean(1, keepdim=True) + norm.eps)
            self.moments[n.name].add(rows)
        return value

    def means(self) -> list[Tensor]:
        """Return the means, checked to be finite."""
        found = []
        for norm in self.stream.norms:
            moment = self.moments[norm.reads]
            mean = moment.total() / max(moment.rows, 1)
            if not bool(torch.isfinite(mean).all()):
                raise SiteError(norm.fqn, expected="finite values on the calibration data", got="NaN or infinite ones")
            found.append(mean)
        return found
