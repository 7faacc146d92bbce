"""Convolutions as maps of patches: `Conv`, and `ConvChain`, a convolution in several smaller ones.

A convolution applies one matrix, (out_channels, in_channels / groups * prod(kernel)), to the patch around every position.
So it is a `LinearMap` whose `in_features` is the size of a patch; `forward` takes images, (batch, channels, *sizes).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lrc.maps.base import Affine, Cost, InParts, LinearMap, Structure, as_parameter, exact_bias

CONV = (F.conv1d, F.conv2d, F.conv3d)


@dataclass(frozen=True)
class Geometry:
    """How a kernel moves over an image; one entry a spatial dimension, beside the number of groups."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    @classmethod
    def unit(cls, dims: int) -> "Geometry":
        """Return the geometry of a 1 x 1 kernel that reads every position."""
        return cls((1,) * dims, (0,) * dims, (1,) * dims)

    @classmethod
    def restored(cls, data: dict[str, Any]) -> "Geometry":
        """Return the geometry that `asdict` wrote, as JSON gives it back."""
        return cls(tuple(data["stride"]), tuple(data["padding"]), tuple(data["dilation"]), int(data["groups"]))

    def along(self, axes: Sequence[int]) -> "Geometry":
        """Return the geometry that moves as this one along `axes`, and as a 1 x 1 kernel along all others."""
        keep = [dim in axes for dim in range(len(self.stride))]
        return Geometry(
            tuple(s if k else 1 for s, k in zip(self.stride, keep, strict=True)),
            tuple(p if k else 0 for p, k in zip(self.padding, keep, strict=True)),
            tuple(d if k else 1 for d, k in zip(self.dilation, keep, strict=True)),
        )

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Convolve x (batch, channels, *sizes) with weight (out_channels, in_channels / groups, *kernel)."""
        convolve = CONV[len(self.stride) - 1]
        made: Tensor = convolve(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return made


class Conv(LinearMap):
    """A convolution with one kernel, weight (out_channels, in_channels / groups, *kernel)."""

    word: ClassVar[str] = "conv"

    def __init__(self, weight: Tensor, geometry: Geometry, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = as_parameter(weight)
        self.geometry = geometry
        self.out_features, self.in_features = weight.shape[0], math.prod(weight.shape[1:])
        self.set_bias(bias)

    @property
    def spatial(self) -> int:
        """The dimensions of the kernel."""
        return len(self.geometry.stride)

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Apply to (batch, channels, *sizes)."""
        return self.geometry(x, self.weight, self.bias)

    def added(self, x: Tensor, bias: Tensor | None, spatial: int, context: Mapping[str, Any]) -> Tensor:
        """Apply the convolution with `bias` for its own, where it has none."""
        return self.geometry(x, self.weight, bias) if self.bias is None else super().added(x, bias, spatial, context)

    def exact(self) -> Affine:
        """Return the matrix of patches (out_channels, patch) and the bias in float64."""
        return Affine(self.weight.detach().double().flatten(1), exact_bias(self.bias))

    def matrix(self) -> Tensor:
        """Return the matrix of patches."""
        return self.weight.flatten(1)

    def cost(self, tokens: int = 1) -> Cost:
        """Return the kernel's numbers, and 2 FLOPs for each of them at every one of `tokens` output positions."""
        size = self.weight.numel()
        return Cost(size, size * self.weight.element_size(), 2 * tokens * size) + self.bias_cost(tokens)

    def structure(self) -> Structure:
        """Return the sizes and the geometry."""
        shape = list(self.weight.shape)
        return {"map": self.word, "shape": shape, "geometry": plain(self.geometry), "bias": self.bias is not None}

    @classmethod
    def restored(cls, structure: Structure) -> "Conv":
        """Return an uninitialised map."""
        shape = structure["shape"]
        bias = torch.empty(shape[0]) if structure["bias"] else None
        return cls(torch.empty(*shape), Geometry.restored(structure["geometry"]), bias)

    def __repr__(self) -> str:
        return f"Conv{_sizes(self.weight)}{self.mark()}"


class ConvChain(InParts):
    """Convolutions one after the other, the last one applied first, with one bias at the end: B after A, or B, R, A.

    Along every spatial dimension at most one of them has a kernel larger than 1, a stride or a padding; so what they stand
    for is again one kernel. Channel factorisation: A has the whole kernel and B is 1 x 1. Spatial split: A is k x 1, B is
    1 x k. Tucker-2: A and B are 1 x 1, R has the kernel. Kernels are stored as `<site>.A`, `<site>.B`.
    """

    word: ClassVar[str] = "conv_chain"

    def __init__(self, kernels: Sequence[Tensor], geometries: Sequence[Geometry], bias: Tensor | None = None) -> None:
        super().__init__()
        self.names = ("B", "A") if len(kernels) == 2 else ("B", "R", "A")
        for name, kernel in zip(self.names, kernels, strict=True):
            setattr(self, name, as_parameter(kernel))
        self.geometries = tuple(geometries)
        self.out_features = kernels[0].shape[0]
        self.in_features = kernels[-1].shape[1] * math.prod(math.prod(kernel.shape[2:]) for kernel in kernels)
        self.set_bias(bias)

    @property
    def kernels(self) -> tuple[Tensor, ...]:
        """The kernels, first the one that is applied last."""
        return tuple(getattr(self, name) for name in self.names)

    @property
    def spatial(self) -> int:
        """The dimensions of the kernels."""
        return len(self.geometries[0].stride)

    @property
    def weight(self) -> Tensor:
        """The one kernel that the chain stands for, (out_channels, in_channels, *kernel)."""
        return self._composed().to(self.dtype)

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Apply to (batch, channels, *sizes)."""
        first, *rest = zip(self.geometries, self.kernels, strict=True)
        for geometry, kernel in reversed(rest):
            x = geometry(x, kernel)
        return first[0](x, first[1], self.bias)

    def exact(self) -> Affine:
        """Return the matrix of patches (out_channels, patch) and the bias in float64."""
        return Affine(self._composed().flatten(1), exact_bias(self.bias))

    def matrix(self) -> Tensor:
        """Return the matrix of patches, (out_channels, patch)."""
        return composed(self.kernels).flatten(1)

    def folded(self) -> Conv:
        """Return the one convolution that the chain stands for."""
        dims = range(len(self.geometries[0].stride))
        geometry = Geometry(
            tuple(math.prod(g.stride[dim] for g in self.geometries) for dim in dims),
            tuple(sum(g.padding[dim] for g in self.geometries) for dim in dims),
            tuple(max(g.dilation[dim] for g in self.geometries) for dim in dims),
        )
        return Conv(self.weight, geometry, self.bias)

    def cost(self, tokens: int = 1) -> Cost:
        """Return the kernels' numbers, and the FLOPs for `tokens` output positions: more positions before a stride."""
        total, positions = self.bias_cost(tokens), tokens
        for geometry, kernel in zip(self.geometries, self.kernels, strict=True):
            size = kernel.numel()
            total = total + Cost(size, size * kernel.element_size(), 2 * positions * size)
            positions *= math.prod(geometry.stride)
        return total

    def structure(self) -> Structure:
        """Return the sizes and the geometries."""
        return {
            "map": self.word, "shapes": [list(kernel.shape) for kernel in self.kernels],
            "geometries": [plain(geometry) for geometry in self.geometries], "bias": self.bias is not None,
        }  # fmt: skip

    @classmethod
    def restored(cls, structure: Structure) -> "ConvChain":
        """Return an uninitialised map."""
        kernels = [torch.empty(*shape) for shape in structure["shapes"]]
        bias = torch.empty(kernels[0].shape[0]) if structure["bias"] else None
        return cls(kernels, [Geometry.restored(data) for data in structure["geometries"]], bias)

    def _composed(self) -> Tensor:
        return composed([kernel.detach().double() for kernel in self.kernels])

    def __repr__(self) -> str:
        return f"ConvChain({', '.join(_sizes(kernel) for kernel in self.kernels)}){self.mark()}"


def composed(kernels: Sequence[Tensor]) -> Tensor:
    """Return the product of kernels, first the one that is applied last: channels contracted, spatial sizes side by side."""
    product = kernels[-1]
    for kernel in reversed(kernels[:-1]):
        product = _after(kernel, product)
    return product


def _after(left: Tensor, right: Tensor) -> Tensor:
    """Return the kernel of `left` after `right`, of which along every dimension at most one is larger than 1."""
    dims = left.ndim - 2
    product = torch.einsum("oc...,cim->oim...", left, right.flatten(2))  # (out, in, kernel of right, *kernel of left)
    shape = [a * b for a, b in zip(left.shape[2:], right.shape[2:], strict=True)]
    product = product.reshape(left.shape[0], right.shape[1], *right.shape[2:], *left.shape[2:])
    order = [place for dim in range(dims) for place in (2 + dim, 2 + dims + dim)]
    return product.permute(0, 1, *order).reshape(left.shape[0], right.shape[1], *shape)


def plain(geometry: Geometry) -> dict[str, Any]:
    """Return a geometry as plain data, which `Geometry.restored` reads."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(geometry).items()}


def _sizes(kernel: Tensor) -> str:
    return f"[{kernel.shape[0]},{kernel.shape[1]},{'x'.join(map(str, kernel.shape[2:]))}]"
