"""A convolution kernel in Tucker form: a small core, and one factor matrix a dimension."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrc.maps.base import Affine, Cost, InParts, Structure, as_parameter, exact_bias
from lrc.maps.conv import Geometry, plain

LETTERS = "abcde", "uvwxy"


class Tucker(InParts):
    """kernel[o, i, h, w] = sum G[a, b, c, d] F0[i, a] F1[o, b] F2[h, c] F3[w, d], for one to three spatial dimensions.

    core: G (rank of in, rank of out, *ranks of the kernel); factors: F0 (in_channels / groups, rank), F1 (out_channels,
    rank), then one (size, rank) for every spatial dimension. Applied as 1 x 1, the small kernel, 1 x 1; in several groups
    as the one kernel that it stands for.
    Source: Tucker (1966), doi:10.1007/BF02289464; as an adapter: FLoRA (2024), arXiv:2405.14739, whose order of axes this is.
    """

    word: ClassVar[str] = "tucker"

    def __init__(self, core: Tensor, factors: Sequence[Tensor], geometry: Geometry, bias: Tensor | None = None) -> None:
        super().__init__()
        ranks = tuple(factor.shape[1] for factor in factors)
        if ranks != tuple(core.shape) or len(factors) != 2 + len(geometry.stride):
            raise ValueError(f"a core of shape {tuple(core.shape)} does not fit factors of ranks {ranks}")
        self.geometry = geometry
        self.G = as_parameter(core)
        for i, factor in enumerate(factors):
            setattr(self, f"F{i}", as_parameter(factor))
        self.kernel = (factors[0].shape[0], *(factor.shape[0] for factor in factors[2:]))
        self.out_features, self.in_features = factors[1].shape[0], math.prod(self.kernel)
        self.set_bias(bias)

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """The factors, in the order in, out, kernel."""
        return tuple(getattr(self, f"F{i}") for i in range(self.G.ndim))

    @property
    def spatial(self) -> int:
        """The dimensions of the kernel."""
        return len(self.geometry.stride)

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Apply to (batch, channels, *sizes)."""
        if self.geometry.groups > 1:
            return self.geometry(x, contracted(self.G, self.factors), self.bias)
        F0, F1, *along = self.factors
        point, ones = Geometry.unit(self.spatial), (1,) * self.spatial
        x = point(x, F0.T.reshape(F0.shape[1], F0.shape[0], *ones))
        x = self.geometry(x, small_kernel(self.G, along))
        return point(x, F1.reshape(*F1.shape, *ones), self.bias)

    def exact(self) -> Affine:
        """Return the matrix of patches (out_channels, patch) and the bias in float64."""
        weight = contracted(self.G.detach().double(), [factor.detach().double() for factor in self.factors])
        return Affine(weight.flatten(1), exact_bias(self.bias))

    def matrix(self) -> Tensor:
        """Return the matrix of patches (out_channels, patch)."""
        return contracted(self.G, self.factors).flatten(1)

    def cost(self, tokens: int = 1) -> Cost:
        """Return the numbers of core and factors, and the FLOPs for `tokens` output positions: more before a stride."""
        size = self.G.numel() + sum(factor.numel() for factor in self.factors)
        F0, F1, *along = self.factors
        sizes = math.prod(factor.shape[0] for factor in along)
        if self.geometry.groups > 1:
            multiplied = tokens * self.out_features * self.in_features
        else:
            before = tokens * math.prod(self.geometry.stride)
            multiplied = before * F0.numel() + tokens * (F0.shape[1] * F1.shape[1] * sizes + F1.numel())
        return Cost(size, size * self.G.element_size(), 2 * multiplied) + self.bias_cost(tokens)

    def structure(self) -> Structure:
        """Return the sizes and the geometry."""
        return {
            "map": self.word, "core": list(self.G.shape), "shape": [factor.shape[0] for factor in self.factors],
            "geometry": plain(self.geometry), "bias": self.bias is not None,
        }  # fmt: skip

    @classmethod
    def restored(cls, structure: Structure) -> "Tucker":
        """Return an uninitialised map."""
        core, shape = structure["core"], structure["shape"]
        factors = [torch.empty(size, rank) for size, rank in zip(shape, core, strict=True)]
        bias = torch.empty(shape[1]) if structure["bias"] else None
        return cls(torch.empty(*core), factors, Geometry.restored(structure["geometry"]), bias)

    def __repr__(self) -> str:
        sizes = "x".join(map(str, self.kernel[1:]))
        return f"Tucker[{self.out_features},{self.kernel[0]},{sizes}; {','.join(map(str, self.G.shape))}]{self.mark()}"


def small_kernel(core: Tensor, along: Sequence[Tensor]) -> Tensor:
    """Return (rank of out, rank of in, *sizes): the core multiplied by the factors of the spatial dimensions."""
    small, large = (letters[: len(along)] for letters in LETTERS)
    terms = ",".join(f"{new}{old}" for old, new in zip(small, large, strict=True))
    return torch.einsum(f"io{small},{terms}->oi{large}", core, *along)


def contracted(core: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Return the kernel (out_channels, in_channels / groups, *sizes)."""
    F0, F1, *along = factors
    return torch.einsum("ab...,oa,ib->oi...", small_kernel(core, along), F1, F0)
