"""Square maps that store no trained matrix: `Identity`, `OutputMask`, `Scalar`."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from lrc.maps.base import Affine, Cost, LinearMap, Structure, as_parameter, exact_bias, over


class Square(LinearMap):
    """What the maps of this file share: y = f(x) + bias, and a dtype only by what they stand between.

    spatial: dimensions after the features, 0 for rows, 2 for images.
    """

    def __init__(self, features: int, dtype: torch.dtype | None = None, bias: Tensor | None = None, spatial: int = 0) -> None:
        super().__init__()
        self.out_features = self.in_features = int(features)
        self._dtype = dtype or torch.get_default_dtype()
        self.dims = spatial
        self.set_bias(bias)

    def change(self, x: Tensor) -> Tensor:
        """Return what the map makes of x, before its bias."""
        return x

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Apply to (..., features, *sizes)."""
        y = self.change(x)
        return y if self.bias is None else y + over(self.bias, self.dims)

    @property
    def spatial(self) -> int:
        """The dimensions after the features."""
        return self.dims

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the matrix that the map stands for; nothing floating but a bias is stored."""
        return self._dtype

    def exact(self) -> Affine:
        """Return the identity and the bias in float64."""
        return Affine(torch.eye(self.in_features, dtype=torch.float64), exact_bias(self.bias))

    def matrix(self) -> Tensor:
        """Return the matrix, which has no gradient."""
        return self.exact().weight.to(self._dtype)

    def cost(self, tokens: int = 1) -> Cost:
        """Return what a bias costs."""
        return self.bias_cost(tokens)

    def structure(self) -> Structure:
        """Return the size."""
        return {"map": self.word, "size": self.in_features, "spatial": self.dims, "bias": self.bias is not None}

    @classmethod
    def restored(cls, structure: Structure) -> "Square":
        """Return a map with an uninitialised bias."""
        size = structure["size"]
        return cls(size, None, torch.empty(size) if structure["bias"] else None, int(structure["spatial"]))

    def __repr__(self) -> str:
        return f"{type(self).__name__}[{self.in_features}]"


class Identity(Square):
    """y = x + bias: the term of a sum that lets its input pass."""

    word: ClassVar[str] = "identity"


class OutputMask(Square):
    """y = x where mask is set, else 0, mask (features,) bool: which outputs of a fused weight an adapter reaches."""

    word: ClassVar[str] = "output_mask"
    mask: Tensor

    def __init__(self, mask: Tensor, dtype: torch.dtype | None = None, bias: Tensor | None = None, spatial: int = 0) -> None:
        super().__init__(mask.shape[0], dtype, bias, spatial)
        self.register_buffer("mask", mask.bool())

    def change(self, x: Tensor) -> Tensor:
        """Set the outputs outside the mask to zero."""
        return x * over(self.mask.type_as(x), self.dims)

    def exact(self) -> Affine:
        """Return the diagonal matrix of zeros and ones, and the bias, in float64."""
        return Affine(torch.diag(self.mask.double()), exact_bias(self.bias))

    def cost(self, tokens: int = 1) -> Cost:
        """Return one byte and one FLOP an output, beside the bias."""
        return Cost(0, self.mask.numel(), tokens * self.mask.numel()) + self.bias_cost(tokens)

    @classmethod
    def restored(cls, structure: Structure) -> "OutputMask":
        """Return a map with an uninitialised mask."""
        size = structure["size"]
        bias = torch.empty(size) if structure["bias"] else None
        return cls(torch.empty(size, dtype=torch.bool), None, bias, int(structure["spatial"]))


class Scalar(Square):
    """y = scalar * x + bias, scalar (1,): a constant that is trained, and may be one parameter of several maps."""

    word: ClassVar[str] = "scalar"

    def __init__(self, scalar: Tensor, features: int, bias: Tensor | None = None, spatial: int = 0) -> None:
        super().__init__(features, scalar.dtype, bias, spatial)
        self.scalar = as_parameter(scalar)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the number."""
        return self.scalar.dtype

    def change(self, x: Tensor) -> Tensor:
        """Multiply by the number."""
        return x * self.scalar

    def exact(self) -> Affine:
        """Return the identity times the number, and the bias, in float64."""
        return Affine(torch.diag(self.scalar.detach().double().expand(self.in_features)), exact_bias(self.bias))

    def matrix(self) -> Tensor:
        """Return the identity times the number."""
        return torch.diag(self.scalar.expand(self.in_features))

    def cost(self, tokens: int = 1) -> Cost:
        """Return one number, and one FLOP a feature, beside the bias."""
        return Cost(1, self.scalar.element_size(), tokens * self.in_features) + self.bias_cost(tokens)

    @classmethod
    def restored(cls, structure: Structure) -> "Scalar":
        """Return an uninitialised map, with a number of its own."""
        size = structure["size"]
        return cls(torch.empty(1), size, torch.empty(size) if structure["bias"] else None, int(structure["spatial"]))
