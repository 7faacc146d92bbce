"""One small matrix, applied to every segment of the features."""

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lrc.maps.base import Affine, Cost, Structure, exact_bias
from lrc.maps.codebook import Codebook
from lrc.maps.composites import Chain
from lrc.maps.conv import Geometry, plain
from lrc.maps.dtypes import OwnDtypes, stored_dtype


class Segments(OwnDtypes):
    """y = (I ⊗ basis) x + bias: basis (d, m) takes each of `count` segments of m features to d.

    Of an image the features are its patches, (in_channels, *kernel) each, and a segment is some whole channels of one: a
    convolution in `count` groups with one kernel for all. A basis in another dtype than the map's (float16) is a buffer: it is
    not trained, and no cast of the model changes it.
    Source: the low-rank representation of sub-vectors of LR2VQ (2022), arXiv:2211.11397.
    """

    word: ClassVar[str] = "segments"
    basis: Tensor

    def __init__(
        self,
        basis: Tensor,
        count: int,
        dtype: torch.dtype | None = None,
        bias: Tensor | None = None,
        sizes: tuple[int, ...] = (),
        geometry: Geometry | None = None,
    ) -> None:
        super().__init__()
        self.d, self.m = basis.shape
        if self.m % math.prod(sizes):
            raise ValueError(f"segments of {self.m} numbers hold no whole channels of {math.prod(sizes)}")
        self.count, self.sizes, self.geometry = count, sizes, geometry
        self.out_features, self.in_features = count * self.d, count * self.m
        self._dtype = dtype or basis.dtype
        self.store("basis", basis)
        self.set_bias(bias)

    @property
    def spatial(self) -> int:
        """The dimensions of the kernel; 0 for rows."""
        return len(self.sizes)

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel that a patch is of, (in_channels, *sizes)."""
        return self.in_features // math.prod(self.sizes), *self.sizes

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Apply to (..., in_features), or to (batch, in_channels, *sizes)."""
        basis = self.computed("basis")
        if self.geometry is None:
            y = F.linear(torch.unflatten(x, -1, (self.count, -1)), basis).flatten(-2)
            return y if self.bias is None else y + self.bias
        kernel = basis.reshape(self.d, -1, *self.sizes).repeat(self.count, 1, *(1,) * len(self.sizes))
        return replace(self.geometry, groups=self.count)(x, kernel, self.bias)

    def storing(self, basis: Tensor) -> "Segments":
        """Return such a map without a bias, of another basis."""
        return Segments(basis, self.count, self._dtype, None, self.sizes, self.geometry)

    def exact(self) -> Affine:
        """Return the block-diagonal weight (out_features, in_features) and the bias in float64."""
        return Affine(self._repeated(self.basis.detach().double()), exact_bias(self.bias))

    def matrix(self) -> Tensor:
        """Return the block-diagonal weight (out_features, in_features)."""
        return self._repeated(self.computed("basis"))

    def _repeated(self, basis: Tensor) -> Tensor:
        made: Tensor = torch.block_diag(*[basis] * self.count)  # type: ignore[no-untyped-call]  # torch has no annotation here
        return made

    def cost(self, tokens: int = 1) -> Cost:
        """Return the d m numbers of the basis, and 2 d m FLOPs a segment for every row or output position."""
        size = self.d * self.m
        return Cost(size, size * self.basis.element_size(), 2 * tokens * size * self.count) + self.bias_cost(tokens)

    def structure(self) -> Structure:
        """Return the sizes, the geometry, and the dtype of the basis where it is its own."""
        return {
            "map": self.word, "shape": [self.d, self.m], "count": self.count, "stored": self.own_dtype("basis"),
            "sizes": list(self.sizes), "geometry": None if self.geometry is None else plain(self.geometry),
            "bias": self.bias is not None,
        }  # fmt: skip

    @classmethod
    def restored(cls, structure: Structure) -> "Segments":
        """Return an uninitialised map."""
        (d, m), count = structure["shape"], int(structure["count"])
        geometry = None if structure["geometry"] is None else Geometry.restored(structure["geometry"])
        basis = torch.empty(d, m, dtype=stored_dtype(structure["stored"]))
        bias = torch.empty(count * d) if structure["bias"] else None
        return cls(basis, count, torch.get_default_dtype(), bias, tuple(structure["sizes"]), geometry)

    def __repr__(self) -> str:
        return f"Segments[{self.count}x{self.d},{self.m}]{self.mark()}"


def coded(
    codes: Tensor,
    codebook: Tensor,
    segments: Segments,
    out_features: int,
    stored: torch.dtype,
    bias: Tensor | None = None,
) -> Chain:
    """Return the map of pieces `codebook[codes] @ basis`, codebook and basis stored in a dtype; computed as `segments` is."""
    dtype = segments.dtype
    outer = Codebook.of(codes, codebook.detach().to(stored), out_features, dtype, spatial=segments.spatial)
    return Chain(outer, segments.storing(segments.basis.detach().to(stored)), bias=bias)
