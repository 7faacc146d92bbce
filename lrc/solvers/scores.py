"""How much every entry of a weight matters: what pruning sums over a unit, or compares entry by entry.

magnitude  W²                 Han et al. (2015), arXiv:1506.02626
wanda      W² E[x²]           Sun et al. (2024), arXiv:2306.11695, squared: what the entry gives to its output on average
taylor     (dL/dgate)²        Molchanov et al. (2019), arXiv:1906.10771, with gates on what is read; summed over rows it is the
                              second-order change of the loss of Theis et al. (2018), arXiv:1801.05787, but for a factor
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lrc.solvers.base import Moments, Need

Entries = Callable[[Tensor, Moments], Tensor]


@dataclass(frozen=True)
class Score:
    """A criterion.

    entries: from a weight (out_features, in_features) and its moments to the scores of its entries, not negative, in float32
    or more; None where gates on what sites read are differentiated in their place. needs: what is measured for it. sides: of a
    unit, what is summed: rows of what writes it (out) unless a batch norm follows, columns of what reads it (in).
    absolute: units of different groups compare as they are, for their cost; else only relative to the mean of their group.
    """

    entries: Entries | None
    needs: frozenset[Need] = frozenset()
    sides: tuple[str, ...] = ("out", "in")
    absolute: bool = False


def magnitude(weight: Tensor, moments: Moments) -> Tensor:
    """Return the squares of the entries."""
    return weight.float().square()


def wanda(weight: Tensor, moments: Moments) -> Tensor:
    """Return the squares of the entries times the mean squares of their inputs; of a weight in groups, of those of its rows."""
    assert moments.gram is not None, "the inputs are measured"
    squares = moments.gram.diagonal() if moments.gram.ndim == 2 else moments.gram
    blocks = squares.reshape(-1, weight.shape[1])
    return weight.float().square() * blocks.repeat_interleave(len(weight) // len(blocks), 0).to(weight.device, torch.float32)


SCORES: Mapping[str, Score] = {
    "magnitude": Score(magnitude),
    "wanda": Score(wanda, frozenset({Need.INPUTS}), sides=("in",)),
    "taylor": Score(None, sides=("in",), absolute=True),
}
