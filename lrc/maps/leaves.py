"""The maps that hold numbers and no other map: `Dense`, `Diagonal`, `Permutation`."""

import copy
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lrc.maps.base import Affine, Cost, LinearMap, Structure, as_parameter, exact_bias, gathered, over

fx.wrap("gathered")  # one operation in the text of a program

M = TypeVar("M", bound=nn.Module)


class Dense(LinearMap):
    """y = weight x + bias, weight (out_features, in_features)."""

    word: ClassVar[str] = "dense"

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = as_parameter(weight)
        self.out_features, self.in_features = weight.shape
        self.set_bias(bias)

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Apply to (..., in_features)."""
        return F.linear(x, self.weight, self.bias)

    def exact(self) -> Affine:
        """Return the weight and the bias in float64."""
        return Affine(self.weight.detach().double(), exact_bias(self.bias))

    def matrix(self) -> Tensor:
        """Return the weight."""
        return self.weight

    def dense(self) -> Affine:
        """Return the weight and the bias themselves."""
        return Affine(self.weight.detach(), None if self.bias is None else self.bias.detach())

    def cost(self, tokens: int = 1) -> Cost:
        """Return m n numbers and 2 m n FLOPs a token."""
        size = self.weight.numel()
        return Cost(size, size * self.weight.element_size(), 2 * tokens * size) + self.bias_cost(tokens)

    def structure(self) -> Structure:
        """Return the sizes."""
        return {"map": self.word, "shape": [self.out_features, self.in_features], "bias": self.bias is not None}

    @classmethod
    def restored(cls, structure: Structure) -> "Dense":
        """Return an uninitialised map."""
        out_features, in_features = structure["shape"]
        return cls(torch.empty(out_features, in_features), torch.empty(out_features) if structure["bias"] else None)

    def __repr__(self) -> str:
        return f"Dense[{self.out_features},{self.in_features}]{self.mark()}"


class Diagonal(LinearMap):
    """y = diagonal * x + bias, diagonal (features,). spatial: dimensions after the features, 0 for rows, 2 for images."""

    word: ClassVar[str] = "diagonal"

    def __init__(self, diagonal: Tensor, bias: Tensor | None = None, spatial: int = 0) -> None:
        super().__init__()
        self.diagonal = as_parameter(diagonal)
        self.out_features = self.in_features = diagonal.shape[0]
        self.dims = spatial
        self.set_bias(bias)

    @property
    def spatial(self) -> int:
        """The dimensions after the features."""
        return self.dims

    def entries(self, x: Tensor) -> Tensor:
        """Return the diagonal as it multiplies x."""
        return self.diagonal

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Apply to (..., features, *sizes)."""
        y = x * over(self.entries(x), self.dims)
        return y if self.bias is None else y + over(self.bias, self.dims)

    def exact(self) -> Affine:
        """Return the diagonal matrix and the bias in float64."""
        return Affine(torch.diag(self.diagonal.detach().double()), exact_bias(self.bias))

    def matrix(self) -> Tensor:
        """Return the diagonal matrix."""
        return torch.diag(self.diagonal)

    def cost(self, tokens: int = 1) -> Cost:
        """Return n numbers and n FLOPs a token."""
        size = self.diagonal.numel()
        return Cost(size, size * self.diagonal.element_size(), tokens * size) + self.bias_cost(tokens)

    def structure(self) -> Structure:
        """Return the size."""
        return {"map": self.word, "size": self.in_features, "spatial": self.dims, "bias": self.bias is not None}

    @classmethod
    def restored(cls, structure: Structure) -> "Diagonal":
        """Return an uninitialised map."""
        size = structure["size"]
        return cls(torch.empty(size), torch.empty(size) if structure["bias"] else None, int(structure.get("spatial", 0)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}[{self.in_features}]{self.mark()}"


class Permutation(LinearMap):
    """y = x[..., index] + bias, index (features,) an order of 0 … features - 1, stored in 4 bytes each."""

    word: ClassVar[str] = "permutation"
    index: Tensor

    def __init__(self, index: Tensor, dtype: torch.dtype = torch.float32, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("index", index.to(torch.int32))
        self.out_features = self.in_features = index.shape[0]
        self._dtype = dtype
        self.set_bias(bias)

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Apply to (..., features)."""
        y = gathered(x, -1, self.index)
        return y if self.bias is None else y + self.bias

    def exact(self) -> Affine:
        """Return the permutation matrix and the bias in float64."""
        eye = torch.eye(self.in_features, dtype=torch.float64, device=self.index.device)
        return Affine(eye[self.index.long()], exact_bias(self.bias))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the matrix that the map stands for; nothing floating but a bias is stored."""
        return self._dtype

    def cost(self, tokens: int = 1) -> Cost:
        """Return no numbers and no FLOPs of its own, but the bytes of the index."""
        return Cost(0, self.index.numel() * self.index.element_size(), 0) + self.bias_cost(tokens)

    def structure(self) -> Structure:
        """Return the size."""
        return {"map": self.word, "size": self.in_features, "bias": self.bias is not None}

    @classmethod
    def restored(cls, structure: Structure) -> "Permutation":
        """Return an uninitialised map."""
        size = structure["size"]
        bias = torch.empty(size) if structure["bias"] else None
        return cls(torch.empty(size, dtype=torch.int32), torch.get_default_dtype(), bias)

    def is_identity(self) -> bool:
        """Say whether the map does nothing: the order 0, 1, 2, … and no bias."""
        same = torch.arange(self.in_features, dtype=torch.int32, device=self.index.device)
        return self.bias is None and bool(torch.equal(self.index, same))

    def __repr__(self) -> str:
        return f"Permutation[{self.in_features}]"


def frozen(made: M) -> M:
    """Return the map with every parameter marked as not trained."""
    return made.requires_grad_(False)


def frozen_base(made: LinearMap) -> LinearMap:
    """Return the map without its bias and with nothing trained; it shares the memory of `made`, which stays as it is."""
    memo = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in made.parameters()}
    memo |= {id(b): b for b in made.buffers()}  # type: ignore[misc]  # tensors both
    twin: LinearMap = copy.deepcopy(made, memo)
    twin.set_bias(None)
    return twin
