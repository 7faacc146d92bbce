"""What a solver is given and what it returns: tensors alone, no graph and no spec file.

A solver decomposes one weight once, into terms ordered by what they are worth; every rank is then a slice of it. So a
plan with another budget costs no new decomposition. The few methods that are not nested in rank say so in their options.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, NamedTuple, ParamSpec, Protocol, Self, TypeVar

import torch
from torch import Tensor

from lrc.spec.base import Tagged
from lrc.spec.registry import SOLVERS, Rule

LOSS_UNIT = "nats per token"  # losses in this unit add up over layers, and may be compared between them
P = ParamSpec("P")
R = TypeVar("R")


class Need(StrEnum):
    """A statistic that a solver asks for; nothing else is measured."""

    INPUTS = "inputs"  # gram, mean, tokens
    GRADIENTS = "gradients"  # fisher, weighted_gram, weighted_mean
    WEIGHT_FISHER = "weight_fisher"  # weight_fisher
    MAGNITUDES = "magnitudes"  # magnitudes


@dataclass(frozen=True)
class Moments:
    """What calibration says about one weight, in float64. Unpadded tokens only; uses of a shared weight are summed.

    gram:   mean over tokens of x xᵀ, shape (in_features, in_features); for one-hot x its diagonal, (in_features,).
    mean:   mean over tokens of x, shape (in_features,).
    fisher: mean over tokens of g gᵀ, g = dL/dy of the loss summed over tokens, shape (out_features, out_features).
    weighted_gram, weighted_mean: means of x xᵀ and x weighed by |g|² of their token, shapes as gram and mean.
    cross:  mean of x x̃ᵀ, x from the dense model and x̃ from the compressed one (`gram` is then that of x̃), or None.
    dense_mean: mean of x from the dense model, where `cross` is given; shape (in_features,), or None.
    weight_fisher: mean over samples of (dL/dW)², elementwise, L the loss summed over a sample's tokens; shape of the weight.
    magnitudes: mean over samples of the mean over their tokens of |x|, shape (in_features,).
    tokens: how many tokens the means are over.
    """

    gram: Tensor | None = None
    mean: Tensor | None = None
    fisher: Tensor | None = None
    weighted_gram: Tensor | None = None
    weighted_mean: Tensor | None = None
    cross: Tensor | None = None
    dense_mean: Tensor | None = None
    weight_fisher: Tensor | None = None
    magnitudes: Tensor | None = None
    tokens: int = 0


class Factors(NamedTuple):
    """A rank-r approximation `B @ A` of a weight and the bias that goes with it, in the weight's dtype."""

    B: Tensor  # (out_features, rank)
    A: Tensor  # (rank, in_features)
    bias: Tensor | None  # (out_features,)


@dataclass(frozen=True)
class Decomposition:
    """A weight as ordered terms: `B[:, :r] @ A[:r]` is the best rank-r choice of the solver, for every r <= len(S).

    B: (out_features, k), A: (k, in_features), S: (k,) descending, non-negative, in the solver's norm; float32 or float64.
    remainder: squared norm beyond the k stored terms (0 when k is full).
    scale, unit: loss(r) = scale * (sum of S[r:]² + remainder), in `unit` ("nats per token", "squared output error", …).
    bias: the layer's own bias, or None. mean: mean input (in_features,) when the bias shall absorb the mean of what is
    dropped (b_r = b + target - B_r A_r mean, with target = the mean output without bias, (out_features,)), or None.
    notes: what the solver had to do that the user should know (a fallback, a raised damping), for plan and report.
    """

    B: Tensor
    A: Tensor
    S: Tensor
    remainder: float = 0.0
    scale: float = 1.0
    unit: str = "squared weight error"
    bias: Tensor | None = None
    mean: Tensor | None = None
    target: Tensor | None = None
    notes: tuple[str, ...] = ()

    def losses(self) -> Tensor:
        """Return loss(r) for r = 0 … k, shape (k + 1,), float64, non-increasing."""
        squares = self.S.double().square()
        tails = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
        return self.scale * (tails + self.remainder)

    def product(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return B (out_features, rank) and A (rank, in_features) of the first terms, as they are stored."""
        return self.B[:, :rank], self.A[:rank]

    def truncate(self, rank: int, dtype: torch.dtype) -> Factors:
        """Return the rank-`rank` factors in `dtype`. 1 <= rank <= len(S)."""
        B, A = self.product(rank)
        bias = self.bias
        if self.mean is not None and self.target is not None:
            shift = self.target.double() - B.double() @ (A.double() @ self.mean.double())
            bias = shift if bias is None else bias.double() + shift
        B, A = B.to(dtype, copy=True).contiguous(), A.to(dtype, copy=True).contiguous()  # own memory, not a slice
        return Factors(B, A, None if bias is None else bias.to(dtype))


class SolverOptions(Tagged):
    """The options of a solver. needs: what must be measured for it; leading: the fewer terms are asked for, the faster.

    nested: the terms of a lower rank are the first ones of a higher one. Where they are not, a weight is decomposed at
    exactly the rank that it gets, `max_rank`, and `Decomposition.losses` holds at that rank alone.
    shares: the allocator that shares a budget where `allocate: auto` leaves it to the solver, or "" for the usual ones.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    leading: ClassVar[bool] = False
    nested: ClassVar[bool] = True
    shares: ClassVar[str] = ""

    def settled(self, *, logits: bool) -> Self:
        """Return the options with what they leave to the model settled. logits: whether its outputs are those of classes."""
        return self


class Solve(Protocol):
    """The signature of a solver."""

    def __call__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        moments: Moments,
        max_rank: int,
        options: SolverOptions,
        generator: torch.Generator,
    ) -> Decomposition:
        """Decompose `weight` (out_features, in_features) into at least `max_rank` terms where it has that many."""


def solver(options: type[SolverOptions]) -> Callable[[Callable[P, R]], Rule[P, R]]:
    """Tie a solver to its options model (see `lrc.spec.registry`)."""
    return SOLVERS.rule(options)
