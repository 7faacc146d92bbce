"""How a stored tensor acts as a matrix: on rows of features, on the patches of an image, or by looking a row up.

Solvers, rank policies and passes see a matrix (out_features, in_features). A layout makes that matrix of the tensor, a map
of its factors, and rows of what a site reads and gives.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lrc.maps.bag import Bag, Entries, Mode, entries_of
from lrc.maps.base import LinearMap
from lrc.maps.composites import Chain
from lrc.maps.conv import Conv, ConvChain, Geometry
from lrc.maps.leaves import Dense
from lrc.maps.lookup import Lookup

Form = Literal["two_factor", "pivoted"]


class Layout(Protocol):
    """What every layout says.

    kind: its name; forms: those that a rank-r product can be stored in; looked_up: sites read indices, not features.
    groups: how many blocks of rows the matrix has that read inputs of their own; in_features are those of one block.
    """

    kind: ClassVar[str]
    looked_up: ClassVar[bool]
    forms: ClassVar[tuple[Form, ...]]

    @property
    def groups(self) -> int:
        """How many blocks there are."""

    def shape(self, stored: tuple[int, ...]) -> tuple[int, int]:
        """Return (out_features, in_features) of a tensor of this shape."""

    def original(self, stored: Tensor, bias: Tensor | None) -> LinearMap:
        """Return the tensor as a map; it shares its memory."""

    def dense(self, weight: Tensor, bias: Tensor | None) -> LinearMap:
        """Return the map of one matrix (out_features, in_features)."""

    def pointwise(self, weight: Tensor, bias: Tensor | None = None) -> LinearMap:
        """Return the map of a matrix that is applied after the site, to the features that it gives."""

    def product(self, B: Tensor, A: Tensor, bias: Tensor | None) -> LinearMap:
        """Return the map of B @ A, B (out_features, rank), A (rank, in_features), or (rank, groups, in_features)."""

    def inputs(self, value: Tensor) -> Tensor:
        """Return what a site reads as rows, (..., groups * in_features); indices stay indices, (..., 1)."""

    def outputs(self, value: Tensor) -> Tensor:
        """Return what a site gives as rows, (..., out_features)."""

    @property
    def spatial(self) -> int:
        """How many dimensions come after the features of what a site gives."""

    def obstacle(self) -> str | None:
        """Return why no product of two factors stands for such a tensor, or None."""

    def obstacle_in_groups(self, shape: tuple[int, int]) -> str | None:
        """Return why no product in groups stands for a matrix of this shape either, or None."""


@dataclass(frozen=True)
class Rows:
    """A linear: the features are the last dimension. transposed: stored as (in_features, out_features)."""

    transposed: bool = False
    kind: ClassVar[str] = "linear"
    looked_up: ClassVar[bool] = False
    forms: ClassVar[tuple[Form, ...]] = ("two_factor", "pivoted")

    @property
    def groups(self) -> int:
        """One block: all rows read the same inputs."""
        return 1

    def shape(self, stored: tuple[int, ...]) -> tuple[int, int]:
        """Return (out_features, in_features)."""
        rows, columns = stored
        return (columns, rows) if self.transposed else (rows, columns)

    def original(self, stored: Tensor, bias: Tensor | None) -> LinearMap:
        """Return a dense map."""
        return Dense(stored.T if self.transposed else stored, bias)

    def dense(self, weight: Tensor, bias: Tensor | None) -> LinearMap:
        """Return a dense map."""
        return Dense(weight, bias)

    def pointwise(self, weight: Tensor, bias: Tensor | None = None) -> LinearMap:
        """Return a dense map."""
        return Dense(weight, bias)

    def product(self, B: Tensor, A: Tensor, bias: Tensor | None) -> LinearMap:
        """Return a chain of two matrices."""
        return Chain(B, A, bias=bias)

    def inputs(self, value: Tensor) -> Tensor:
        """Return the value itself."""
        return value

    def outputs(self, value: Tensor) -> Tensor:
        """Return the value itself."""
        return value

    @property
    def spatial(self) -> int:
        """None."""
        return 0

    def obstacle_in_groups(self, shape: tuple[int, int]) -> str | None:
        """Return None: there always is one."""
        return None

    def obstacle(self) -> str | None:
        """Return None: there always is one."""
        return None


@dataclass(frozen=True)
class JointRows(Rows):
    """A linear whose weight is a table too: its rows are looked up elsewhere, which only two factors allow."""

    forms: ClassVar[tuple[Form, ...]] = ("two_factor",)


@dataclass(frozen=True)
class Patches:
    """A convolution: kernel (out_channels, in_channels, *kernel) over the patches that `geometry` reads."""

    kernel: tuple[int, ...]
    geometry: Geometry
    kind: ClassVar[str] = "conv"
    looked_up: ClassVar[bool] = False
    forms: ClassVar[tuple[Form, ...]] = ("two_factor",)

    @property
    def groups(self) -> int:
        """The convolution's groups."""
        return self.geometry.groups

    def shape(self, stored: tuple[int, ...]) -> tuple[int, int]:
        """Return (out_channels, size of a patch)."""
        return stored[0], math.prod(stored[1:])

    def original(self, stored: Tensor, bias: Tensor | None) -> LinearMap:
        """Return one convolution."""
        return Conv(stored, self.geometry, bias)

    def dense(self, weight: Tensor, bias: Tensor | None) -> LinearMap:
        """Return one convolution."""
        return Conv(weight.reshape(weight.shape[0], -1, *self.kernel), self.geometry, bias)

    def pointwise(self, weight: Tensor, bias: Tensor | None = None) -> LinearMap:
        """Return a convolution of size 1 x 1."""
        dims = len(self.kernel)
        return Conv(weight.reshape(*weight.shape, *(1,) * dims), Geometry.unit(dims), bias)

    def product(self, B: Tensor, A: Tensor, bias: Tensor | None) -> LinearMap:
        """Return a convolution to `rank` channels (of every group) with the whole kernel, and one of 1 x 1 after it."""
        dims, rows = len(self.kernel), A.shape[0] * self.groups
        outer = B.reshape(*B.shape, *(1,) * dims)
        inner = A.movedim(0, -2).reshape(rows, -1, *self.kernel)  # of several groups, one after the other
        return ConvChain([outer, inner], [replace(Geometry.unit(dims), groups=self.groups), self.geometry], bias)

    def inputs(self, value: Tensor) -> Tensor:
        """Return the patches of (batch, channels, *sizes) as (batch, *output sizes, patch), the groups' one after the other."""
        geometry, dims = self.geometry, len(self.kernel)
        if math.prod(self.kernel) == 1 and not any(geometry.padding):
            steps = tuple(slice(None, None, s) for s in geometry.stride)
            return value[(slice(None), slice(None), *steps)].movedim(1, -1)
        value = F.pad(value, [side for p in reversed(geometry.padding) for side in (p, p)])
        for dim, (size, stride, dilation) in enumerate(zip(self.kernel, geometry.stride, geometry.dilation, strict=True)):
            value = value.unfold(2 + dim, dilation * (size - 1) + 1, stride)[..., ::dilation]  # kernel dims go last
        return value.movedim(1, 1 + dims).flatten(1 + dims)  # (batch, *output sizes, channels * kernel)

    def outputs(self, value: Tensor) -> Tensor:
        """Return (batch, channels, *sizes) with the channels last."""
        return value.movedim(1, -1)

    @property
    def spatial(self) -> int:
        """Those of the kernel."""
        return len(self.kernel)

    def size(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """Return (out_channels, in_channels of a group, *kernel) of a matrix of this shape."""
        return shape[0], shape[1] // math.prod(self.kernel), *self.kernel

    def obstacle(self) -> str | None:
        """Return the groups, where there are several."""
        groups = self.geometry.groups
        return f"a convolution in {groups} groups, each of which sees channels of its own" if groups > 1 else None

    def obstacle_in_groups(self, shape: tuple[int, int]) -> str | None:
        """Return None but for a group of one channel, whose matrix has a single row or belongs to a single kernel."""
        out_channels, in_channels = shape[0] // self.groups, shape[1] // math.prod(self.kernel)
        if self.groups == 1 or min(out_channels, in_channels) > 1:
            return None
        which = "input" if in_channels == 1 else "output"
        return f"a convolution in {self.groups} groups of one {which} channel each: there is nothing to share between channels"


@dataclass(frozen=True)
class Indices:
    """An embedding: the table's rows are looked up, so the matrix is its transpose, applied to one-hot vectors."""

    padding_index: int | None = None
    kind: ClassVar[str] = "embedding"
    looked_up: ClassVar[bool] = True
    forms: ClassVar[tuple[Form, ...]] = ("two_factor",)

    @property
    def groups(self) -> int:
        """One block: all rows read the same inputs."""
        return 1

    def shape(self, stored: tuple[int, ...]) -> tuple[int, int]:
        """Return (features, rows of the table)."""
        return stored[1], stored[0]

    def original(self, stored: Tensor, bias: Tensor | None) -> LinearMap:
        """Return the table as a map."""
        return Lookup(stored, self.padding_index, bias)

    def dense(self, weight: Tensor, bias: Tensor | None) -> LinearMap:
        """Return a table."""
        return Lookup(weight.T.contiguous(), self.padding_index, bias)

    def pointwise(self, weight: Tensor, bias: Tensor | None = None) -> LinearMap:
        """Return a dense map."""
        return Dense(weight, bias)

    def product(self, B: Tensor, A: Tensor, bias: Tensor | None) -> LinearMap:
        """Return a table of `rank` columns and a matrix after it."""
        return Chain(B, Lookup(A.T.contiguous(), self.padding_index), bias=bias)

    def inputs(self, value: Tensor) -> Tensor:
        """Return the indices as (..., 1)."""
        return value[..., None]

    def outputs(self, value: Tensor) -> Tensor:
        """Return the value itself."""
        return value

    @property
    def spatial(self) -> int:
        """None."""
        return 0

    def obstacle_in_groups(self, shape: tuple[int, int]) -> str | None:
        """Return None: there always is one."""
        return None

    def obstacle(self) -> str | None:
        """Return None: there always is one."""
        return None


@dataclass(frozen=True)
class Bags(Indices):
    """An embedding of bags: the rows of a bag are added, so the matrix is the transposed table, applied to their counts.

    mode, last_offset: see `Bag`.
    """

    mode: Mode = "mean"
    last_offset: bool = False
    kind: ClassVar[str] = "embedding_bag"

    def original(self, stored: Tensor, bias: Tensor | None) -> LinearMap:
        """Return the table as a map."""
        return Bag(stored, self.mode, self.padding_index, last_offset=self.last_offset, bias=bias)

    def product(self, B: Tensor, A: Tensor, bias: Tensor | None) -> LinearMap:
        """Return bags of a table of `rank` columns and a matrix after them."""
        return Chain(B, self.original(A.T.contiguous(), None), bias=bias)

    def entries(self, value: Tensor, rows: int, context: Mapping[str, Tensor]) -> Entries:
        """Return the vectors of counts that a site reads, by their entries. rows: of the table; context: see `Bag.forward`."""
        return entries_of(
            value, context.get("offsets"), context.get("per_sample_weights"), rows=rows, mode=self.mode,
            padding_index=self.padding_index, last_offset=self.last_offset,
        )  # fmt: skip

    def obstacle(self) -> str | None:
        """Return that a maximum is no product."""
        return "the maximum over a bag is no product with a matrix" if self.mode == "max" else None


def planned(layout: Layout, shape: tuple[int, int], rank: int, *, bias: bool) -> LinearMap:
    """Return an uninitialised product of rank `rank` and shape (out_features, in_features), on the current device."""
    out_features, in_features = shape
    added = torch.empty(out_features) if bias else None
    A = torch.empty(rank, in_features) if layout.groups == 1 else torch.empty(rank, layout.groups, in_features)
    return layout.product(torch.empty(out_features, rank), A, added)
