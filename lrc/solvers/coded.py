"""What solvers share that store the pieces of a weight as codes: no product of two factors, and so a form of its own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, ParamSpec, Protocol, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from lrc.solvers.base import Moments, SolverOptions
from lrc.spec.registry import SOLVERS, Rule

P = ParamSpec("P")
R = TypeVar("R")


class CodedOptions(SolverOptions):
    """The options of a solver in codes; `rank` is the dimension d that pieces of `m` numbers are clustered in."""

    m: int = Field(default=16, ge=1, description="Numbers of a row that share a code: the compression ratio.")
    k: int | None = Field(
        default=256, ge=2, le=65536, description="Codewords, log2(k) bits a code; null: no codes yet, for the recipe `lr2vq`."
    )
    dtype: Literal["float16", "model"] = Field(
        default="float16", description="Of codewords and basis: float16, which are not trained, or as the model."
    )
    nested: ClassVar[bool] = False


@dataclass(frozen=True)
class Coded:
    """V ≈ codebook[codes] @ basis, or coefficients @ basis where there are no codes; V the pieces of the weight's rows, (N, m).

    coefficients: Z (N, d); basis: P (d, m), orthonormal rows; codebook: (k, d); codes: (N,), int64. low_rank, clustering: the
    squared errors |V - Z P|² and |Z - codebook[codes]|², whose sum is that of the weight. notes: as of `Decomposition`.
    """

    coefficients: Tensor
    basis: Tensor
    codebook: Tensor | None = None
    codes: Tensor | None = None
    low_rank: float = 0.0
    clustering: float = 0.0
    notes: tuple[str, ...] = ()


class SolveCoded(Protocol):
    """The signature of a solver in codes."""

    def __call__(self, weight: Tensor, moments: Moments, rank: int, options: CodedOptions, generator: torch.Generator) -> Coded:
        """Return the codes of `weight` (out_features, in_features) in at most `rank` dimensions; m divides in_features."""


def coded_solver(options: type[CodedOptions]) -> Callable[[Callable[P, R]], Rule[P, R]]:
    """Tie a solver in codes to its options model (see `lrc.spec.registry`)."""
    return SOLVERS.rule(options)
