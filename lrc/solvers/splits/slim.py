"""SLiM: prune by size of weight and input, then one low-rank product for what the pruning took away."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from lrc.solvers.base import Moments, Need
from lrc.solvers.splits.base import SparseOptions, Split, splitter
from lrc.solvers.splits.inputs import input_scale
from lrc.solvers.splits.low_rank import LowRank, balanced_factors
from lrc.solvers.splits.support import strongest


class SlimSplitter(SparseOptions):
    """One shot: a pruned weight, and a low-rank product for its error."""

    type: Literal["slim"] = "slim"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.INPUTS})


@splitter(SlimSplitter)
def slim(weight: Tensor, moments: Moments, rank: int, options: SlimSplitter, generator: torch.Generator) -> Split:
    """Return S, the entries of W of the largest |W_ij| d_j, and the best product for E = W - S in ||(E - B A) diag(d)||_F.

    d: the root mean square of every input. The error is the tail of the singular values of E diag(d). Raises SolverError
    where the inputs were not measured.
    Source: Mozaffari et al. (2025), SLiM, arXiv:2410.09615, its SLiM-LoRA. Departures: the root mean square in place of the
    mean magnitude of an input; the sparse part is not quantised.
    """
    scale, notes = input_scale(moments)
    W = weight.double()
    support = strongest((W * scale).abs(), options.pattern, options.density or 0.0)
    E = torch.where(support, 0.0, W) * scale
    B, A = LowRank(min(rank, *weight.shape)).factors(E)
    left = float((E - B @ A).norm())
    B, A = balanced_factors(B, A, torch.float64)
    whole = float((W * scale).norm())
    rest = torch.where(support, weight, torch.zeros_like(weight))
    error = left / whole if whole else 0.0
    return Split(B.to(weight.dtype), (A / scale).to(weight.dtype), rest, support, error, (left,), notes, loss=left**2)
