"""SLTrain's structure, a support drawn at random: fitted to a trained weight, or started from scratch."""

import math
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lrc.solvers.base import Moments
from lrc.solvers.splits.alternate import alternate
from lrc.solvers.splits.base import SparseOptions, Split, splitter
from lrc.solvers.splits.support import Pattern, strongest


class SltrainSplitter(SparseOptions):
    """A random fixed support, as it is trained from scratch."""

    type: Literal["sltrain"] = "sltrain"
    density: float | None = Field(default=0.03, ge=0, le=1, description="Share of the entries in the support.")
    pattern: Pattern = Field(default="all", description="Where they are drawn: `all`, `rows`, `n:m` or blocks such as `16x16`.")
    iterations: int = Field(default=20, ge=1, description="Turns of fitting the product and the numbers of the support.")
    start: Literal["fitted", "random"] = Field(
        default="fitted", description="fitted: near the weight; random: as the paper pretrains, whatever the weight is."
    )
    alpha: float | None = Field(default=None, gt=0, description="The product is scaled by alpha / rank; by 1 without it.")


@splitter(SltrainSplitter)
def sltrain(weight: Tensor, moments: Moments, rank: int, options: SltrainSplitter, generator: torch.Generator) -> Split:
    """Return (alpha / rank) B A + S, S on int(density * out_features * in_features) entries drawn at random.

    Entries are drawn without replacement by `generator`; data is not looked at. fitted: near W in the Frobenius norm. random:
    A and the numbers of S uniform in ±1/sqrt(in_features), B zero, so that S is the whole weight at first.
    Source: Han et al. (2024), SLTrain, arXiv:2406.02214, section 3, where all starts are random.
    """
    drawn = torch.rand(weight.shape, generator=generator, dtype=torch.float64)
    support = strongest(drawn, options.pattern, options.density or 0.0)
    scaling = 1.0 if options.alpha is None or rank == 0 else options.alpha / rank
    if options.start == "random":
        return from_scratch(weight, support, rank, scaling, generator)
    ones = torch.ones(weight.shape[1], dtype=torch.float64)
    found = alternate(weight, ones, rank, lambda _: support, options.iterations, tolerance=1e-9)
    return replace(found, B=found.B / scaling, scaling=scaling)


def from_scratch(weight: Tensor, support: Tensor, rank: int, scaling: float, generator: torch.Generator) -> Split:
    """Return parts that have the weight's shape and dtype, and none of its numbers."""
    rows, columns = weight.shape
    bound = 1 / math.sqrt(columns)
    A, S = (torch.empty(n, columns).uniform_(-bound, bound, generator=generator) for n in (rank, rows))
    B = weight.new_zeros(rows, rank)
    rest = torch.where(support, S, 0.0).to(weight.dtype)
    return Split(B, A.to(weight.dtype), rest, support, None, notes=("starts at random",), scaling=scaling)
