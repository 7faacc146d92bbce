"""An embedding as a map: a row of a table is the product of its transpose with a one-hot vector."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from lrc.maps.base import Affine, Cost, LinearMap, Structure, as_parameter, exact_bias
from lrc.maps.composites import Composite


class Lookup(LinearMap):
    """y = table[x] + bias for indices x, table (in_features, out_features): in_features is the number of rows.

    padding_index: the row that gets no gradient, or None.
    """

    word: ClassVar[str] = "lookup"

    def __init__(self, table: Tensor, padding_index: int | None = None, bias: Tensor | None = None) -> None:
        super().__init__()
        self.table = as_parameter(table)
        self.padding_index = padding_index
        self.in_features, self.out_features = table.shape
        self.set_bias(bias)

    @property
    def weight(self) -> Tensor:
        """The table, for code that asks an embedding for its `weight`."""
        return self.table

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Apply to indices of any shape; gives (*shape, out_features)."""
        y = torch.embedding(self.table, x, -1 if self.padding_index is None else self.padding_index)
        return y if self.bias is None else y + self.bias

    def over(self, table: Tensor, bias: Tensor | None) -> "Lookup":
        """Return such a lookup in another table."""
        return Lookup(table, self.padding_index, bias)

    def exact(self) -> Affine:
        """Return the transposed table and the bias in float64."""
        return Affine(self.table.detach().double().T, exact_bias(self.bias))

    def matrix(self) -> Tensor:
        """Return the transposed table."""
        return self.table.T

    def cost(self, tokens: int = 1) -> Cost:
        """Return the table's numbers; reading a row takes no FLOPs."""
        size = self.table.numel()
        return Cost(size, size * self.table.element_size()) + self.bias_cost(tokens)

    def structure(self) -> Structure:
        """Return the sizes and the padding index."""
        shape = list(self.table.shape)
        return {"map": self.word, "shape": shape, "padding_index": self.padding_index, "bias": self.bias is not None}

    @classmethod
    def restored(cls, structure: Structure) -> "Lookup":
        """Return an uninitialised map."""
        rows, features = structure["shape"]
        bias = torch.empty(features) if structure["bias"] else None
        return cls(torch.empty(rows, features), structure["padding_index"], bias)

    def __repr__(self) -> str:
        return f"Lookup[{self.in_features},{self.out_features}]{self.mark()}"


def lookup_of(made: LinearMap) -> Lookup | None:
    """Return the table that a map reads its rows from, where it starts with one."""
    first: object = made
    while isinstance(first, Composite):
        first = first.slots[-1]
    return first if isinstance(first, Lookup) else None
