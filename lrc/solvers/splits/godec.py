"""GoDec: the nearest matrix that is low-rank plus sparse, by turns."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lrc.solvers.base import Moments
from lrc.solvers.splits.alternate import alternate
from lrc.solvers.splits.base import SparseOptions, Split, splitter
from lrc.solvers.splits.support import Pattern, strongest


class GodecSplitter(SparseOptions):
    """Low-rank plus sparse, nearest to the weight itself."""

    type: Literal["godec"] = "godec"
    pattern: Pattern = Field(default="all", description=SparseOptions.model_fields["pattern"].description)
    iterations: int = Field(default=100, ge=1, description="At most so many; it stops where the error no longer falls.")
    tolerance: float = Field(default=1e-7, ge=0, description="Fall of the relative squared error below which it stops.")


@splitter(GodecSplitter)
def godec(weight: Tensor, moments: Moments, rank: int, options: GodecSplitter, generator: torch.Generator) -> Split:
    """Return B A + S near W in the Frobenius norm, S of the pattern and density asked for.

    The error never grows from one iteration to the next. Computed in float64; data is not looked at.
    Source: Zhou & Tao (2011), GoDec, ICML. Departure: warm alternating steps in place of random projections.
    """
    ones = torch.ones(weight.shape[1], dtype=torch.float64)

    def sparse(rest: Tensor) -> Tensor:
        return strongest(rest.abs(), options.pattern, options.density or 0.0)

    return alternate(weight, ones, rank, sparse, options.iterations, options.tolerance)
