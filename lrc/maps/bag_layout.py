"""How a table acts as a matrix on bags of indices."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lrc.maps.bag import Bag, Entries, Mode, entries_of
from lrc.maps.base import LinearMap
from lrc.maps.composites import Chain
from lrc.maps.layouts import Indices


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
