"""OATS: low-rank plus sparse, with columns scaled by the size of their inputs."""

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lrc.solvers.base import Moments, Need
from lrc.solvers.splits.alternate import alternate
from lrc.solvers.splits.base import SparseOptions, Split, splitter
from lrc.solvers.splits.inputs import input_scale
from lrc.solvers.splits.support import strongest


class OatsSplitter(SparseOptions):
    """Outlier-aware: low-rank plus sparse, nearest where the inputs are large."""

    type: Literal["oats"] = "oats"
    iterations: int = Field(default=80, ge=1, description="Turns of a low-rank and a sparse step.")
    needs: ClassVar[frozenset[Need]] = frozenset({Need.INPUTS})


@splitter(OatsSplitter)
def oats(weight: Tensor, moments: Moments, rank: int, options: OatsSplitter, generator: torch.Generator) -> Split:
    """Return B A + S near W in ||(W - B A - S) diag(d)||_F, d the root mean square of every input.

    Rank 0 is pruning by Wanda's scores |W_ij| d_j; density 0 the truncated SVD of W diag(d). The error never grows from one
    iteration to the next. An input that is always zero gets the least weight that the others leave visible, and a note.
    Raises SolverError where the inputs were not measured.
    Source: Zhang & Papyan (2025), OATS, arXiv:2409.13652. Departure: after the first, warm alternating steps in place of SVDs.
    """
    scale, notes = input_scale(moments)

    def sparse(rest: Tensor) -> Tensor:
        return strongest(rest.abs(), options.pattern, options.density or 0.0)

    return replace(alternate(weight, scale, rank, sparse, options.iterations), notes=notes)
