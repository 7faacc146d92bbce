"""What every number format says: how a matrix becomes packed tensors, and what those stand for."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from lrc.spec.base import Tagged

Encoded = dict[str, Tensor]
"""The packed tensors of a matrix, by name; `codes` is one of them."""


class NumberFormat(Tagged, ABC):
    """A way to store a matrix in few bits. A format knows shapes and bits, never where a matrix comes from."""

    type: Any
    bits: int
    floating: ClassVar[frozenset[str]] = frozenset()  # tensors that keep their own dtype when a model is cast

    @abstractmethod
    def encode(self, weight: Tensor) -> Encoded:
        """Return the packed tensors of a finite matrix (out_features, in_features)."""

    @abstractmethod
    def decode(self, encoded: Encoded, shape: tuple[int, int]) -> Tensor:
        """Return the matrix, float32, that packed tensors stand for."""

    @abstractmethod
    def empty(self, shape: tuple[int, int]) -> Encoded:
        """Return packed tensors of the right sizes with uninitialised numbers, on the current device."""

    @abstractmethod
    def bits_per_weight(self) -> float:
        """Return what a number takes in a large matrix, scales counted, in bits."""

    def rounded(self, weight: Tensor) -> Tensor:
        """Return the nearest matrix that the format can hold, in the dtype of `weight`."""
        shape = (weight.shape[0], weight.shape[1])
        return self.decode(self.encode(weight), shape).to(weight.dtype)

    @property
    def name(self) -> str:
        """The short name: `nf4`, `int8`."""
        return f"{self.type}{self.bits}"
