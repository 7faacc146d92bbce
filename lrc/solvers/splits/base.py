"""What a splitter is given and what it returns: a weight as a low-rank product plus a rest that is cheap to store."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, ParamSpec, Protocol, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lrc.formats import FORMATS, Encoded, FormatField
from lrc.solvers.base import Moments, Need
from lrc.solvers.splits.support import Pattern, density_of
from lrc.spec.base import Tagged
from lrc.spec.registry import SPLITTERS, Rule

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Split:
    """W ≈ scaling * B @ A + rest.

    B: (out_features, rank), A: (rank, in_features), rest: (out_features, in_features), in the weight's dtype. support: where
    a sparse rest may be other than zero, bool, or None. encoded: a quantised rest as it is stored, or None. error:
    ||W - scaling B A - rest|| over ||W||, in the splitter's own norm; None for parts that do not come from W. history: that
    norm, absolute, after every iteration. loss: its square for the parts that are returned, which adds up over matrices.
    """

    B: Tensor
    A: Tensor
    rest: Tensor
    support: Tensor | None
    error: float | None
    history: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()
    encoded: Encoded | None = None
    loss: float = 0.0
    scaling: float = 1.0


class SplitterOptions(Tagged):
    """The options of a splitter. needs: what must be measured for it."""

    needs: ClassVar[frozenset[Need]] = frozenset()


class SparseOptions(SplitterOptions):
    """A splitter whose rest is sparse."""

    density: float | None = Field(
        default=None, ge=0, le=1, description="Share of the entries that the sparse part keeps; left out under `params_kept`."
    )
    pattern: Pattern = Field(
        default="rows",
        description="Where they may stand: the largest of each row (rows), of all (all), n of every m inputs (`2:4`), or whole "
        "blocks (`16x16`).",
    )

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> Any:
        if density_of(self.pattern) is not None and self.density is not None:
            raise ValueError(f"the pattern {self.pattern} says the density already; leave out `density`")
        return self


class QuantizedOptions(SplitterOptions):
    """A splitter whose rest is stored in few bits."""

    format: FormatField = Field(default=FORMATS["nf4"], description="How the rest is stored: nf2, nf3, nf4, nf8, int4, int8.")


class Splitter(Protocol):
    """The signature of a splitter."""

    def __call__(
        self, weight: Tensor, moments: Moments, rank: int, options: SplitterOptions, generator: torch.Generator
    ) -> Split:
        """Split `weight` (out_features, in_features) into a product of rank `rank` and a rest."""


def splitter(options: type[SplitterOptions]) -> Callable[[Callable[P, R]], Rule[P, R]]:
    """Tie a splitter to its options model (see `lrc.spec.registry`)."""
    return SPLITTERS.rule(options)
