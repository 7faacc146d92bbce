"""Triangular factors in the numbers that they have: no zero of the other half is stored, nor the ones of a unit diagonal."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lrc.maps.base import Affine, Cost, InParts, Structure, as_parameter, exact_bias


class Triangular(InParts):
    """A lower triangular matrix (rows, columns), rows >= columns, or an upper one (rows, columns), rows <= columns.

    unit: the diagonal is all ones and is not stored. packed: the triangle in rectangular full packed form, without waste and
    without an index; rest: the rows below the square (of an upper one, transposed: the columns beside it).
    Source of the packing: Gustavson, Wasniewski, Dongarra & Langou (2010), doi:10.1145/1731022.1731028.
    """

    word: ClassVar[str] = "triangular"

    def __init__(
        self,
        packed: Tensor,
        rest: Tensor,
        *,
        upper: bool = False,
        unit: bool = True,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.packed, self.rest = as_parameter(packed), as_parameter(rest)
        self.upper, self.unit = upper, unit
        self.size = rest.shape[1]
        if tuple(packed.shape) != packed_shape(self.size - unit):
            raise ValueError(
                f"a triangle of {self.size} packs into {packed_shape(self.size - unit)}, not {tuple(packed.shape)}"
            )
        shape = (self.size + rest.shape[0], self.size)
        self.out_features, self.in_features = shape[::-1] if upper else shape
        self.set_bias(bias)

    @classmethod
    def of(cls, matrix: Tensor, *, upper: bool = False, unit: bool = True, bias: Tensor | None = None) -> "Triangular":
        """Return the triangle of a matrix; what stands elsewhere in it is left out."""
        lower = matrix.detach().T if upper else matrix.detach()
        size = lower.shape[1]
        if lower.shape[0] < size:
            raise ValueError(
                f"{'an upper' if upper else 'a lower'} triangular factor cannot have the shape {tuple(matrix.shape)}"
            )
        square = lower[1:size, : size - 1] if unit else lower[:size]
        return cls(packed(square), lower[size:].clone(), upper=upper, unit=unit, bias=bias)

    def matrix(self) -> Tensor:
        """Return the matrix (out_features, in_features) in the dtype of its numbers."""
        return unpacked(self.packed, self.rest, self.upper, self.unit)

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Apply to (..., in_features)."""
        return F.linear(x, self.matrix(), self.bias)

    def exact(self) -> Affine:
        """Return the matrix and the bias in float64."""
        weight = unpacked(self.packed.detach().double(), self.rest.detach().double(), self.upper, self.unit)
        return Affine(weight, exact_bias(self.bias))

    def cost(self, tokens: int = 1) -> Cost:
        """Return the stored numbers, and 2 m n FLOPs a token: the triangle is multiplied as a full matrix."""
        size = self.packed.numel() + self.rest.numel()
        flops = 2 * tokens * self.out_features * self.in_features
        return Cost(size, size * self.packed.element_size(), flops) + self.bias_cost(tokens)

    def structure(self) -> Structure:
        """Return the sizes and the kind of triangle."""
        shape = [self.out_features, self.in_features]
        return {"map": self.word, "shape": shape, "upper": self.upper, "unit": self.unit, "bias": self.bias is not None}

    @classmethod
    def restored(cls, structure: Structure) -> "Triangular":
        """Return an uninitialised map."""
        out_features, in_features = structure["shape"]
        upper, unit = bool(structure["upper"]), bool(structure["unit"])
        rows, size = (in_features, out_features) if upper else (out_features, in_features)
        bias = torch.empty(out_features) if structure["bias"] else None
        return cls(torch.empty(packed_shape(size - unit)), torch.empty(rows - size, size), upper=upper, unit=unit, bias=bias)

    def __repr__(self) -> str:
        kind = "upper" if self.upper else "lower"
        return f"Triangular[{self.out_features},{self.in_features}; {'unit ' if self.unit else ''}{kind}]{self.mark()}"


def packed_shape(order: int) -> tuple[int, int]:
    """Return the shape of a packed triangle of `order` rows, its diagonal among them: order (order + 1) / 2 numbers."""
    return (order, (order + 1) // 2) if order % 2 else (order + 1, order // 2)


def packed(square: Tensor) -> Tensor:
    """Return the lower triangle of a square matrix, its diagonal among them, in rectangular full packed form.

    The left half of the triangle stays where it is; the small triangle to the right is laid, transposed, over the zeros.
    """
    order = square.shape[0]
    rows, columns = packed_shape(order)
    array = square.new_zeros(rows, columns)
    if order == 0:
        return array
    shift = 1 - order % 2
    array[shift:] = square[:, :columns].tril()
    right = square[columns:, columns:].tril().T
    array[: right.shape[0], columns - right.shape[0] :] += right
    return array


def unpacked(array: Tensor, rest: Tensor, upper: bool, unit: bool) -> Tensor:
    """Return the matrix whose packed triangle and whose other rows these are."""
    size = rest.shape[1]
    order = size - unit
    columns = array.shape[1]
    shift = 1 - order % 2
    square = array[shift:].tril()
    if order > 1:
        right = array[: order - columns, columns - (order - columns) :].triu().T
        square = torch.cat([square, F.pad(right, (0, 0, columns, 0))], 1)
    if unit:
        ones = array.new_ones(size).diag()
        square = F.pad(square, (0, 1, 1, 0)) + ones if order else ones
    lower = torch.cat([square, rest])
    return lower.T if upper else lower
