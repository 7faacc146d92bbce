"""SLTrain's structure on a trained weight: a support drawn at random, and the product and the numbers fitted to it."""

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


@splitter(SltrainSplitter)
def sltrain(weight: Tensor, moments: Moments, rank: int, options: SltrainSplitter, generator: torch.Generator) -> Split:
    """Return B A + S near W in the Frobenius norm, S on int(density * out_features * in_features) entries drawn at random.

    Entries are drawn without replacement by `generator`; data is not looked at.
    Source: Han et al. (2024), SLTrain, arXiv:2406.02214; there the parts start at random, here from the weight.
    """
    drawn = torch.rand(weight.shape, generator=generator, dtype=torch.float64)
    support = strongest(drawn, options.pattern, options.density or 0.0)
    ones = torch.ones(weight.shape[1], dtype=torch.float64)
    return alternate(weight, ones, rank, lambda _: support, options.iterations, tolerance=1e-9)
