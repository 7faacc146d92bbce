"""Factors for training from scratch: the layer's shape is kept, what it has learned is not."""

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lrc.solvers.base import Decomposition, Moments, SolverOptions, solver
from lrc.solvers.checks import check
from lrc.solvers.terms import storage_dtype


class RandomSolver(SolverOptions):
    """Random factors and bias, to be trained from scratch: the trained weight and bias are discarded."""

    type: Literal["random"] = "random"
    nested: ClassVar[bool] = False  # how large B is depends on the rank


@solver(RandomSolver)
def random_init(
    weight: Tensor,
    bias: Tensor | None,
    moments: Moments,
    max_rank: int,
    options: RandomSolver,
    generator: torch.Generator,
) -> Decomposition:
    """Return A, B and a bias as two new linear layers in_features -> max_rank -> out_features start out.

    weight: (out_features, in_features); of it only shape and dtype are used, and of the bias whether there is one. Entries
    are uniform within 1 / sqrt(columns) of their matrix, the bias as those of B. The loss is the true ||W - B A||². A note
    says that the layer has to be trained. Raises SolverError on values that are not finite.
    Source: He et al. (2015), arXiv:1502.01852, with a = sqrt(5) as torch.nn.Linear has it; factorization by design of
    Cahyawijaya (2021), Greenformers, arXiv:2108.10808.
    """
    check(weight, bias, moments, max_rank, options.needs)
    out_features, in_features = weight.shape
    dtype = storage_dtype(weight)

    def drawn(*size: int, columns: int) -> Tensor:
        bound = 1 / math.sqrt(columns)
        return (torch.rand(size, generator=generator, dtype=dtype) * (2 * bound) - bound).to(weight.device)

    A = drawn(max_rank, in_features, columns=in_features)
    B = drawn(out_features, max_rank, columns=max_rank)
    made = None if bias is None else drawn(out_features, columns=max_rank)
    remainder = float((weight.double() - B.double() @ A.double()).square().sum())
    S = torch.zeros(max_rank, dtype=torch.float64)
    note = "random factors: what the layer has learned, its bias included, is discarded, and the model has to be trained"
    return Decomposition(B, A, S, remainder, bias=made, notes=(note,))
