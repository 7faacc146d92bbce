"""Dropout as a map: the identity, but for what it leaves out in training."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lrc.maps.base import Affine, Cost, LinearMap, Structure


class Dropout(LinearMap):
    """y = x; in training each entry is zero with probability `p`, and the others are divided by 1 - p.

    It holds no numbers: `dtype` is that of what it stands for, the identity of `features`.
    """

    word: ClassVar[str] = "dropout"

    def __init__(self, features: int, p: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.in_features = self.out_features = features
        self.p = p
        self._dtype = dtype
        self.set_bias(None)

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Apply to a tensor of any shape."""
        return F.dropout(x, self.p, self.training)

    def exact(self) -> Affine:
        """Return the identity in float64."""
        return Affine(torch.eye(self.in_features, dtype=torch.float64), None)

    def matrix(self) -> Tensor:
        """Return the identity."""
        return torch.eye(self.in_features, dtype=self._dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the matrix that the map stands for."""
        return self._dtype

    def cost(self, tokens: int = 1) -> Cost:
        """Return nothing: in use it is the identity."""
        return Cost()

    def structure(self) -> Structure:
        """Return the size and the probability."""
        return {"map": self.word, "size": self.in_features, "p": self.p}

    @classmethod
    def restored(cls, structure: Structure) -> "Dropout":
        """Return the map."""
        return cls(structure["size"], float(structure["p"]), torch.get_default_dtype())

    def __repr__(self) -> str:
        return f"Dropout({self.p:g})"
