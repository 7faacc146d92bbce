"""What an initialiser is given and what it returns: tensors alone, no graph and no spec file."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, ParamSpec, Protocol, TypeVar

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
    `conv` or `embedding`. moments: what calibration says. gradient: the mean dL/dW, (out_features, in_features), float32, or
    None. observed: what the options' observer has found in the rows that the site reads, or None.
    """

    weight: Callable[[], Tensor]
    shape: tuple[int, int]
    rank: int
    scaling: float
    kind: Literal["linear", "conv", "embedding"]
    generator: torch.Generator
    moments: Moments = field(default_factory=Moments)
    gradient: Tensor | None = None
    observed: Any = None


@dataclass(frozen=True)
class Initial:
    """Where an adapter starts: B (out_features, rank) and A (rank, in_features), float32 or float64.

    core: the matrix between them, (rank, rank), of methods that have one. base: what the frozen weight becomes, where it
    does not stay; subtracted: that is the weight without `scaling` B A. notes: fallbacks and the like.
    """

    B: Tensor
    A: Tensor
    core: Tensor | None = None
    base: Tensor | None = None
    subtracted: bool = False
    notes: tuple[str, ...] = ()


class InitialiserOptions(Tagged):
    """The options of an initialiser. needs: what must be measured for it.

    gradients: whether it wants the mean gradient of every weight. changes_base: whether the frozen weight becomes another one.
    kinds: the sites that it knows.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    gradients: ClassVar[bool] = False
    changes_base: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv", "embedding"})

    def observer(self, features: int, rank: int) -> "Observer | None":
        """Return what looks at the rows that a site reads, (rows, features), for an adapter of this rank, if anything does."""
        return None

    def ranks(self, wanted: Mapping[str, int], found: Callable[[str], Any]) -> Mapping[str, int]:
        """Return the rank of every site, 0 for no adapter. wanted: as the spec says; found: what a site's observer found."""
        return wanted

    def obstacle(self, kind: str, shape: tuple[int, int], rank: int) -> str | None:
        """Return why an adapter of this rank cannot start so at a site of this kind and shape, or None."""
        if kind not in self.kinds:
            return f"`init: {self.type}` knows no {kind}"
        if self.changes_base and rank > min(shape):
            return f"`init: {self.type}` has {min(shape)} terms at most, and rank {rank} was asked for"
        return None


class Observer(Protocol):
    """What looks at the rows that a site reads, batch by batch. done: it needs no more."""

    @property
    def done(self) -> bool:
        """Whether more batches would change nothing that matters."""

    def see(self, rows: Tensor) -> None:
        """Look at (rows, features)."""

    def found(self) -> Any:
        """Return what was found."""


class Initialise(Protocol):
    """The signature of an initialiser."""

    def __call__(self, start: Start, options: InitialiserOptions) -> Initial:
        """Return where the adapter of one site starts."""


def initialiser(options: type[InitialiserOptions]) -> Callable[[Callable[P, R]], Rule[P, R]]:
    """Tie an initialiser to its options model (see `lrc.spec.registry`)."""
    return INITIALISERS.rule(options)


def subtracted(start: Start, weight: Tensor, B: Tensor, A: Tensor) -> Initial:
    """Return the factors with the base that keeps the sum as it was: W - scaling B A."""
    return Initial(B, A, base=weight - start.scaling * (B @ A), subtracted=True)


def lowrank_svd(matrix: Tensor, q: int, niter: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return about the q leading singular triples U (m, q), S (q,), Vh (q, n), by `torch.svd_lowrank` from a seed.

    Source: Halko, Martinsson & Tropp (2011), doi:10.1137/090771806, algorithm 5.1.
    """
    with torch.random.fork_rng(devices=[]):  # it draws from the global generator alone
        torch.manual_seed(seed)
        U, S, V = torch.svd_lowrank(matrix, q=q, niter=niter)
    return U, S, V.T
