"""The statistics that the batch norms of a rewritten program should have: of what they read now."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lrc.data import Batches
from lrc.measure.lockstep import Stepper
from lrc.program import Program

Statistics = Mapping[str, Tensor]


@torch.no_grad()
def norm_statistics(program: Program, batches: Batches, norms: Sequence[str]) -> dict[str, Tensor]:
    """Return the mean and variance of what batch norms read on calibration data, by the names of the buffers that hold them.

    norms: nodes of `batch_norm`. They are measured in graph order, each behind those that were measured before it, over all
    batches together; the variance is unbiased, as torch keeps it. In the dtype of the buffers; nothing is changed.
    """
    found: dict[str, Tensor] = {}
    nodes = program.nodes
    steppers = [Stepper(program, batch) for batch in batches]
    order = {name: place for place, name in enumerate(nodes)}
    for name in sorted(norms, key=order.__getitem__):
        node: Any = nodes[name]
        reads, mean, variance = node.args[0], node.args[3], node.args[4]
        count, total, squares = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for stepper in steppers:
            rows = stepper.advance_to(reads.name).movedim(1, -1).flatten(0, -2)
            count += len(rows)
            total = total + rows.sum(0, dtype=torch.float64)
            squares = squares + (rows * rows).sum(0, dtype=torch.float64)
        average = total / max(count, 1)
        spread = (squares - count * average**2).clamp(min=0) / max(count - 1, 1)
        for read, value in ((mean, average), (variance, spread)):
            _tell(steppers, found, read, value)
    return found


def _tell(steppers: Sequence[Stepper], found: dict[str, Tensor], read: fx.Node, value: Any) -> None:
    """Keep a measured statistic, and let what still runs see it."""
    old = steppers[0].program.tensors()[str(read.target)] if steppers else value
    found[str(read.target)] = value.to(old)
    for stepper in steppers:
        stepper.values[read.name] = found[str(read.target)]
        stepper.done.add(read.name)
