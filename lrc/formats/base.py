"""What every number format says: how a matrix becomes packed tensors, and what those stand for."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrc.spec.base import Tagged

Encoded = dict[str, Tensor]
"""The packed tensors of a matrix, by name; `codes` is one of them."""


class NumberFormat(Tagged, ABC):
    """A way to store a matrix in few bits. A format knows shapes and bits, never where a matrix comes from."""

    type: Any
    bits: int
    floating: ClassVar[frozenset[str]] = frozenset()  # tensors that keep their own dtype when a model is cast

    @property
    @abstractmethod
    def levels(self) -> Tensor:
        """What the codes stand for at scale 1, ascending, zero among them; float32, on the CPU."""

    @abstractmethod
    def in_blocks(self, weight: Tensor) -> Tensor:
        """Return a matrix as rows of numbers that share a scale, (blocks, block), filled up with zeros."""

    @abstractmethod
    def store_scales(self, scales: Tensor, shape: tuple[int, int]) -> Encoded:
        """Return the packed tensors of the scales (blocks,) of a matrix of this shape, without codes."""

    @abstractmethod
    def spread_scales(self, encoded: Encoded, shape: tuple[int, int]) -> Tensor:
        """Return the stored scale of every entry, (out_features, in_features), float32."""

    @abstractmethod
    def with_codes(self, encoded: Encoded, places: Tensor) -> Encoded:
        """Return stored scales together with places in `levels`, (out_features, in_features), packed."""

    def encode(self, weight: Tensor) -> Encoded:
        """Return the packed tensors of a finite matrix (out_features, in_features), the largest magnitudes as scales.

        A block of zeros is stored exactly. A number above its rounded-down scale is clipped to the scale.
        """
        shape = (weight.shape[0], weight.shape[1])
        weight = weight.detach().float()
        scales = self.store_scales(self.in_blocks(weight).abs().amax(1) / self.levels[-1].item(), shape)
        return self.with_codes(scales, self.nearest(weight, self.spread_scales(scales, shape)))

    def nearest(self, weight: Tensor, scales: Tensor) -> Tensor:
        """Return the places in `levels` nearest to numbers of these scales, in their shape; of equally near ones the lower."""
        levels = self.levels.to(weight.device, weight.dtype)
        relative = torch.where(scales > 0, weight / torch.where(scales > 0, scales, torch.ones_like(scales)), 0.0)
        return torch.bucketize(relative, (levels[1:] + levels[:-1]) / 2)

    @abstractmethod
    def decode(self, encoded: Encoded, shape: tuple[int, int]) -> Tensor:
        """Return the matrix, float32, that packed tensors stand for."""

    @abstractmethod
    def empty(self, shape: tuple[int, int]) -> Encoded:
        """Return packed tensors of the right sizes with uninitialised numbers, on the current device."""

    @abstractmethod
    def bits_per_weight(self) -> float:
        """Return what a number takes in a large matrix, scales counted, in bits."""

    def stored_bytes(self, shape: tuple[int, int]) -> int:
        """Return what a matrix (out_features, in_features) takes, padding and scales included, in bytes."""
        with torch.device("meta"):
            return sum(tensor.numel() * tensor.element_size() for tensor in self.empty(shape).values())

    def rounded(self, weight: Tensor) -> Tensor:
        """Return the nearest matrix that the format can hold, in the dtype of `weight`."""
        shape = (weight.shape[0], weight.shape[1])
        return self.decode(self.encode(weight), shape).to(weight.dtype)

    @property
    def name(self) -> str:
        """The short name: `nf4`, `int8`."""
        return f"{self.type}{self.bits}"
