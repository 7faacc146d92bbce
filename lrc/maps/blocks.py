"""A factor in two blocks, so that one can be frozen and the other trained."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lrc.maps.base import Affine, Cost, InParts, Structure, as_parameter, exact_bias

Along = Literal["out", "in"]


class Blocks(InParts):
    """A matrix in two: `first` above `second` (along "out"), or left of it (along "in").

    first: (out_features or a part, in_features or a part), and second likewise. Each block is a parameter of its own, so a
    frozen one is out of the reach of any optimiser, weight decay included.
    Source: Break-for-Make (2024), arXiv:2403.19456, whose projections are partly learnable.
    """

    word: ClassVar[str] = "blocks"

    def __init__(self, first: Tensor, second: Tensor, along: Along, bias: Tensor | None = None) -> None:
        super().__init__()
        if along not in ("out", "in"):
            raise ValueError(f"blocks lie along `out` or `in`, not {along!r}")
        self.first, self.second = as_parameter(first), as_parameter(second)
        self.along: Along = along
        self.out_features, self.in_features = self.matrix().shape
        self.set_bias(bias)

    def matrix(self) -> Tensor:
        """Return the matrix (out_features, in_features)."""
        return torch.cat([self.first, self.second], 0 if self.along == "out" else 1)

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Apply to (..., in_features)."""
        return F.linear(x, self.matrix(), self.bias)

    def exact(self) -> Affine:
        """Return the matrix and the bias in float64."""
        return Affine(self.matrix().detach().double(), exact_bias(self.bias))

    def cost(self, tokens: int = 1) -> Cost:
        """Return m n numbers and 2 m n FLOPs a token, as of one matrix."""
        size = self.out_features * self.in_features
        return Cost(size, size * self.first.element_size(), 2 * tokens * size) + self.bias_cost(tokens)

    def structure(self) -> Structure:
        """Return the sizes of the blocks."""
        shapes = [list(self.first.shape), list(self.second.shape)]
        return {"map": self.word, "shapes": shapes, "along": self.along, "bias": self.bias is not None}

    @classmethod
    def restored(cls, structure: Structure) -> "Blocks":
        """Return an uninitialised map."""
        first, second = (torch.empty(*shape) for shape in structure["shapes"])
        made = cls(first, second, structure["along"])
        if structure["bias"]:
            made.set_bias(torch.empty(made.out_features))
        return made

    def __repr__(self) -> str:
        cut = self.first.shape[0 if self.along == "out" else 1]
        starred = ["" if block.requires_grad else "*" for block in (self.first, self.second)]
        whole = self.out_features if self.along == "out" else self.in_features
        parts = f"{cut}{starred[0]}+{whole - cut}{starred[1]}"
        return f"Blocks[{parts},{self.in_features}]" if self.along == "out" else f"Blocks[{self.out_features},{parts}]"
