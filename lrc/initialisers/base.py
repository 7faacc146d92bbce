"""What an initialiser is given and what it returns: tensors alone, no graph and no spec file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from lrc.solvers import Moments, Need
from lrc.spec.base import Tagged
from lrc.spec.registry import INITIALISERS, Rule

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Start:
    """One site, as an initialiser sees it.

    weight: returns W (out_features, in_features), at least float32, a new tensor; for a convolution the matrix of patches,
    for an embedding the transposed table. shape: its shape. rank, scaling: of the adapter `scaling * B @ A`. kind: `linear`,
    `conv` or `embedding`. moments: what calibration says. gradient: the mean dL/dW, (out_features, in_features), or None.
    inputs: batches of the rows that the site reads, (rows, in_features) each, or None.
    """

    weight: Callable[[], Tensor]
    shape: tuple[int, int]
    rank: int
    scaling: float
    kind: Literal["linear", "conv", "embedding"]
    generator: torch.Generator
    moments: Moments = field(default_factory=Moments)
    gradient: Tensor | None = None
    inputs: Sequence[Tensor] | None = None


@dataclass(frozen=True)
class Initial:
    """Where an adapter starts: B (out_features, rank) and A (rank, in_features), float32 or float64.

    core: the matrix between them, (rank, rank), of methods that have one. base: what the frozen weight becomes, where it
    does not stay. notes: fallbacks and the like.
    """

    B: Tensor
    A: Tensor
    core: Tensor | None = None
    base: Tensor | None = None
    notes: tuple[str, ...] = ()


class InitialiserOptions(Tagged):
    """The options of an initialiser. needs: what must be measured for it.

    gradients, inputs: whether it wants the mean gradient of every weight, or the rows that every site reads. changes_base:
    whether the frozen weight becomes another one.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    gradients: ClassVar[bool] = False
    inputs: ClassVar[bool] = False
    changes_base: ClassVar[bool] = False

    def obstacle(self, kind: str, shape: tuple[int, int], rank: int) -> str | None:
        """Return why an adapter of this rank cannot start so at a site of this kind and shape, or None."""
        if self.changes_base and rank > min(shape):
            return f"`init: {self.type}` has {min(shape)} terms at most, and rank {rank} was asked for"
        return None


class Initialise(Protocol):
    """The signature of an initialiser."""

    def __call__(self, start: Start, options: InitialiserOptions) -> Initial:
        """Return where the adapter of one site starts."""


def initialiser(options: type[InitialiserOptions]) -> Callable[[Callable[P, R]], Rule[P, R]]:
    """Tie an initialiser to its options model (see `lrc.spec.registry`)."""
    return INITIALISERS.rule(options)


def subtracted(start: Start, weight: Tensor, B: Tensor, A: Tensor) -> Initial:
    """Return the factors with the base that keeps the sum as it was: W - scaling B A."""
    return Initial(B, A, base=torch.addmm(weight, B, A, alpha=-start.scaling))
