"""A bag of looked-up rows as a map: their sum or mean is the product of the transposed table with a vector of counts."""

from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lrc.maps.base import Structure
from lrc.maps.lookup import Lookup

Mode = Literal["sum", "mean", "max"]


class Bag(Lookup):
    """y = sum over a bag of table[x], weighted, or their mean, plus bias; table (in_features, out_features).

    mode: `max` is applied as well, but is no linear map. padding_index: a row that no bag counts, or None. last_offset: the
    last offset is the end of the last bag, and starts none.
    """

    word: ClassVar[str] = "bag"

    def __init__(
        self,
        table: Tensor,
        mode: Mode = "mean",
        padding_index: int | None = None,
        *,
        last_offset: bool = False,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__(table, padding_index, bias)
        self.mode: Mode = mode
        self.last_offset = last_offset

    def forward(
        self, x: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None, **context: Any
    ) -> Tensor:
        """Apply to indices (bags, size), or to (indices,) with the `offsets` (bags,) where bags start; gives (bags, features).

        per_sample_weights: what each row is multiplied with, in the shape of x.
        """
        if offsets is None and self.mode != "max" and torch.compiler.is_exporting():
            y = self._added(x, per_sample_weights)  # of the operator itself ONNX makes a loop over bags
        else:
            y = F.embedding_bag(
                x, self.table, offsets, mode=self.mode, per_sample_weights=per_sample_weights,
                include_last_offset=self.last_offset, padding_idx=self.padding_index,
            )  # fmt: skip
        return y if self.bias is None else y + self.bias

    def _added(self, x: Tensor, weights: Tensor | None) -> Tensor:
        rows = F.embedding(x, self.table)
        if weights is not None:
            rows = rows * weights[..., None]
        if self.padding_index is None:
            return rows.sum(-2) if self.mode == "sum" else rows.mean(-2)
        counted = (x != self.padding_index)[..., None].to(rows.dtype)
        total = (rows * counted).sum(-2)
        return total if self.mode == "sum" else total / counted.sum(-2).clamp(min=1)

    def over(self, table: Tensor, bias: Tensor | None) -> "Bag":
        """Return such a bag of another table."""
        return Bag(table, self.mode, self.padding_index, last_offset=self.last_offset, bias=bias)

    def structure(self) -> Structure:
        """Return the sizes and how a bag is read."""
        return super().structure() | {"mode": self.mode, "last_offset": self.last_offset}

    @classmethod
    def restored(cls, structure: Structure) -> "Bag":
        """Return an uninitialised map."""
        rows, features = structure["shape"]
        bias = torch.empty(features) if structure["bias"] else None
        mode, last = structure["mode"], bool(structure["last_offset"])
        return cls(torch.empty(rows, features), mode, structure["padding_index"], last_offset=last, bias=bias)

    def __repr__(self) -> str:
        return f"Bag[{self.in_features},{self.out_features}]{self.mark()}"


class Entries(NamedTuple):
    """The entries of the vectors that bags multiply a table with, each at most once; all other entries are zero.

    indices: the row of the table; bags: the bag; values: how often, or with which weight, the bag has the row; number: of bags.
    """

    indices: Tensor
    bags: Tensor
    values: Tensor
    number: int


def entries_of(
    x: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    *,
    rows: int,
    mode: Mode,
    padding_index: int | None,
    last_offset: bool,
) -> Entries:
    """Return the entries of bags as `Bag.forward` takes them, of a table of `rows` rows; values in float64."""
    if offsets is None:
        count, flat = len(x), x.reshape(-1)
        bags = torch.arange(count, device=x.device).repeat_interleave(x.shape[1])
    else:
        starts = offsets[:-1] if last_offset else offsets
        count, flat = len(starts), x
        places = torch.arange(len(x), device=x.device, dtype=starts.dtype)
        bags = torch.searchsorted(starts.contiguous(), places, right=True) - 1
    values = torch.ones(len(flat), dtype=torch.float64, device=x.device)
    if per_sample_weights is not None:
        values = per_sample_weights.detach().reshape(-1).double()
    if padding_index is not None:
        kept = flat != padding_index
        flat, bags, values = flat[kept], bags[kept], values[kept]
    if mode == "mean":
        values = values / torch.bincount(bags, minlength=count)[bags]
    pairs, which = torch.unique(bags * rows + flat, return_inverse=True)
    summed = torch.zeros(len(pairs), dtype=torch.float64, device=x.device).index_add_(0, which, values)
    return Entries(pairs % rows, pairs // rows, summed, count)
