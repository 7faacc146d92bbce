"""A matrix with a fixed support: the numbers that are not zero, and where they stand."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lrc.formats import pack, packed_bytes, unpack
from lrc.maps.base import Affine, Cost, InParts, Structure, as_parameter, exact_bias

INDEX_BITS = 32  # a position takes this much; below one number in so many, positions are smaller than a mask


class Sparse(InParts):
    """y = weight x + bias, the weight (out_features, in_features) zero outside of a fixed support.

    values: (count,), the numbers of the support in row-major order; they may be trained. support: one bit for every
    entry, or for few numbers their positions in 4 bytes each, whichever is smaller. The weight is spread out where it is
    applied: stored sparse, run dense.
    """

    word: ClassVar[str] = "sparse"
    support: Tensor

    def __init__(self, values: Tensor, support: Tensor, shape: tuple[int, int], bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.values = as_parameter(values)
        self.register_buffer("support", support)
        self.set_bias(bias)

    @classmethod
    def of(cls, weight: Tensor, support: Tensor, bias: Tensor | None = None) -> "Sparse":
        """Return the map of the entries of `weight` where `support`, bool of the same shape, is true."""
        flat = support.reshape(-1)
        positions = flat.nonzero()[:, 0]
        stored = positions.to(torch.int32) if by_position(len(positions), flat.numel()) else pack(flat, 1)
        shape = (weight.shape[0], weight.shape[1])
        return cls(weight.detach().reshape(-1)[positions].clone(), stored, shape, bias)

    @property
    def count(self) -> int:
        """How many numbers the support has."""
        return self.values.shape[0]

    def spread(self, values: Tensor | None = None) -> Tensor:
        """Return the weight (out_features, in_features), of other values where given; gradients flow to them."""
        values = self.values if values is None else values
        size = self.out_features * self.in_features
        if self.support.dtype == torch.int32:
            flat = values.new_zeros(size).index_put((self.support.long(),), values)
        else:
            inside = unpack(self.support, 1, size)
            place = (inside.cumsum(0) - 1).clamp(min=0)
            flat = values[place] * inside.to(values.dtype) if self.count else values.new_zeros(size)
        return flat.reshape(self.out_features, self.in_features)

    def gathered(self, gradient: Tensor) -> Tensor:
        """Return the numbers of a matrix (out_features, in_features) on the support, in the order of the values."""
        flat = gradient.reshape(-1)
        if self.support.dtype == torch.int32:
            return flat[self.support.long()]
        return flat[torch.nonzero_static(unpack(self.support, 1, flat.numel()), size=self.count)[:, 0]]

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Apply to (..., in_features)."""
        return F.linear(x, self.spread(), self.bias)

    def exact(self) -> Affine:
        """Return the weight and the bias in float64."""
        return Affine(self.spread().detach().double(), exact_bias(self.bias))

    def cost(self, tokens: int = 1) -> Cost:
        """Return the numbers of the support, the support in bytes alone, and the FLOPs of the dense product that is run."""
        index = self.support.numel() * self.support.element_size()
        flops = 2 * tokens * self.out_features * self.in_features
        return Cost(self.count, self.count * self.values.element_size() + index, flops) + self.bias_cost(tokens)

    def structure(self) -> Structure:
        """Return the sizes."""
        shape = [self.out_features, self.in_features]
        return {"map": self.word, "shape": shape, "count": self.count, "bias": self.bias is not None}

    @classmethod
    def restored(cls, structure: Structure) -> "Sparse":
        """Return an uninitialised map."""
        (rows, columns), count = structure["shape"], structure["count"]
        if by_position(count, rows * columns):
            support = torch.empty(count, dtype=torch.int32)
        else:
            support = torch.empty(packed_bytes(rows * columns, 1), dtype=torch.uint8)
        return cls(torch.empty(count), support, (rows, columns), torch.empty(rows) if structure["bias"] else None)

    def __repr__(self) -> str:
        share = self.count / (self.out_features * self.in_features)
        return f"Sparse[{self.out_features},{self.in_features},{share:.1%}]{self.mark()}"


def by_position(count: int, size: int) -> bool:
    """Say whether the positions of `count` numbers out of `size` take fewer bytes than one bit for every entry."""
    return INDEX_BITS * count < size
