"""The truncated singular value decomposition by whichever way is fastest within a stated error."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from lrc.solvers.base import Decomposition, Moments, solver
from lrc.solvers.gram import GramSolver, gram
from lrc.solvers.randomized import RandomizedSolver, WithinTolerance, directions, randomized
from lrc.solvers.svd import SvdSolver, svd

LEAST = 384  # shorter side from which random subspaces win: tests/benchmarks/bench_svd.py


class AutoSolver(WithinTolerance):
    """Truncated singular value decomposition by the fastest of `randomized`, `gram` and `svd` that meets the error."""

    type: Literal["auto"] = "auto"


@solver(AutoSolver)
def auto(
    weight: Tensor,
    bias: Tensor | None,
    moments: Moments,
    max_rank: int,
    options: AutoSolver,
    generator: torch.Generator,
) -> Decomposition:
    """Return the leading terms of the truncated SVD, at most `options.tolerance` above the least Frobenius error.

    `randomized` where a subspace of the rank is enough smaller than the weight (it checks its error, and falls back by
    itself); else `gram`, unless what its terms leave may be its own rounding, then `svd`. A note names the one taken.
    weight: (out_features, in_features). Raises SolverError on values that are not finite.
    """
    asked = moments, max_rank
    search = RandomizedSolver(tolerance=options.tolerance)
    if min(weight.shape) >= LEAST and directions(weight, max_rank, search) is not None:
        found = randomized(weight, bias, *asked, search, generator)
        return replace(found, notes=("auto: randomized", *found.notes))
    found = gram(weight, bias, *asked, GramSolver(), generator)
    if max_rank >= min(weight.shape) or found.remainder * options.tolerance > rounding(weight, found):
        return replace(found, notes=("auto: gram", *found.notes))
    return replace(svd(weight, bias, *asked, SvdSolver(), generator), notes=("auto: svd",))


def rounding(weight: Tensor, found: Decomposition) -> float:
    """Return what the squared error of terms from a float64 Gram matrix may be off by."""
    return max(weight.shape) * torch.finfo(torch.float64).eps * float(found.S[0]) ** 2
