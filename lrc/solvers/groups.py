"""What a solver of several weights together is given and what it returns: tensors alone, as for one weight.

A group solver says by `grouping` which sites of a graph belong together; the runner finds them. It decomposes a group once,
into terms with one joint loss for every rank, so that an allocator gives the whole group one rank under any budget. What a
rank makes of every weight is cut from these terms: products of matrices, some of which several weights may share, and of
places that are read or written.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from lrc.solvers.base import Moments, SolverOptions


class Grouping(StrEnum):
    """Which sites of a graph are decomposed together."""

    ALIKE = "alike"  # the same layer of `group_size` blocks that follow each other
    MODULES = "modules"  # the linears of an MLP; values and output, queries and keys of an attention


@dataclass(frozen=True)
class Member:
    """One weight (out_features, in_features) of a group, its bias (out_features,) and what calibration says of it."""

    weight: Tensor
    bias: Tensor | None
    moments: Moments


@dataclass(frozen=True)
class WeightGroup:
    """The weights of a group. kind: what they are together (`alike`, `mlp`, …); facts: its numbers (heads, for one)."""

    kind: str
    members: tuple[Member, ...]
    facts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Places:
    """A factor without numbers: `kept` of `size` features, index (kept,) int64, rising.

    spread: the factor is (size, kept) and writes its input to these places, zeros elsewhere; else it is (kept, size) and reads
    them.
    """

    index: Tensor
    size: int
    spread: bool


class Part(NamedTuple):
    """What one weight becomes: the product of its factors, the last one applied first.

    factors: matrices and places. A matrix that is the same tensor in several parts is stored once. bias: added to the
    outermost matrix's product, of as many entries as that has rows, or None.
    """

    factors: tuple[Tensor | Places, ...]
    bias: Tensor | None


@dataclass(frozen=True)
class GroupTerms:
    """A decomposed group. losses: joint loss at rank 0 … k, (k + 1,), float64, non-increasing, in `unit`.

    tensors: what parts are cut from, named by the solver; facts: whole numbers that it cuts by. notes: as of `Decomposition`.
    """

    losses: Tensor
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, int] = field(default_factory=dict)
    unit: str = "squared weight error"
    notes: tuple[str, ...] = ()

    @property
    def full_rank(self) -> int:
        """The largest rank there is."""
        return len(self.losses) - 1


class GroupOptions(SolverOptions):
    """The options of a group solver. form: what its products are called in plans."""

    grouping: ClassVar[Grouping]
    form: ClassVar[str]

    @abstractmethod
    def cut(self, terms: GroupTerms, rank: int) -> Sequence[Part]:
        """Return what rank `rank` makes of every member, in order.

        Must work on meta tensors too: what a rank would cost is read off the shapes.
        """


class SolveGroup(Protocol):
    """The signature of a group solver."""

    def __call__(
        self, group: WeightGroup, max_rank: int | None, options: GroupOptions, generator: torch.Generator
    ) -> GroupTerms:
        """Decompose the weights of `group` together. max_rank: the most terms that are asked for; None: all there are."""


def stored_size(parts: Sequence[Part]) -> tuple[int, int]:
    """Return the numbers of matrices and biases, a shared one once, and the entries of indices that `parts` need."""
    matrices = {id(f): f for part in parts for f in part.factors if isinstance(f, Tensor)}
    numbers = sum(matrix.numel() for matrix in matrices.values())
    numbers += sum(part.bias.numel() for part in parts if part.bias is not None)
    places = sum(f.size if f.spread else len(f.index) for part in parts for f in part.factors if isinstance(f, Places))
    return numbers, places


def multiplied(part: Part) -> int:
    """Return the FLOPs of a part for one row: a multiply-add counts 2, an added bias 1."""
    numbers = sum(factor.numel() for factor in part.factors if isinstance(factor, Tensor))
    return 2 * numbers + (0 if part.bias is None else part.bias.numel())


def fused_rows(facts: Mapping[str, int], role: str) -> Tensor:
    """Return the rows of a fused linear that are queries (`q`), keys (`k`) or values (`v`), head by head, int64.

    facts: `heads`, `kv_heads`, `size`, and of every role where it starts and how far it is to that of the next shared head.
    """
    of_one = facts["size"] * (facts["heads"] // facts["kv_heads"] if role == "q" else 1)
    starts = facts[f"start_{role}"] + facts[f"stride_{role}"] * torch.arange(facts["kv_heads"])
    return (starts[:, None] + torch.arange(of_one)).flatten()
