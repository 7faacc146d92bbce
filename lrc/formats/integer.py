"""Symmetric integers, scaled by blocks along a row: the form that kernels for weights in 4 and 8 bits read."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from lrc.formats.base import Encoded, NumberFormat
from lrc.formats.packing import pack, packed_bytes, unpack


class Integer(NumberFormat):
    """scale * (code - 2**(bits - 1)), the scale shared by `block` numbers of one row.

    The largest magnitude of a block becomes the largest integer, 2**(bits - 1) - 1. Rows are padded to whole blocks.
    """

    type: Literal["int"] = "int"
    bits: Literal[4, 8] = Field(default=4, description="Bits of a number.")
    block: int = Field(default=32, ge=16, description="Numbers of a row that share a scale.")
    floating: ClassVar[frozenset[str]] = frozenset({"scales"})

    @property
    def levels(self) -> Tensor:
        """The integers from -(2**(bits - 1) - 1) to 2**(bits - 1) - 1."""
        return torch.arange(-self._largest, self._largest + 1, dtype=torch.float32)

    def in_blocks(self, weight: Tensor) -> Tensor:
        """Return pieces of rows."""
        return F.pad(weight, (0, -weight.shape[1] % self.block)).reshape(-1, self.block)

    def store_scales(self, scales: Tensor, shape: tuple[int, int]) -> Encoded:
        """Return `scales` (out_features * blocks of a row,), float32."""
        return {"scales": scales.float()}

    def spread_scales(self, encoded: Encoded, shape: tuple[int, int]) -> Tensor:
        """Return the scale of every entry."""
        rows, columns = shape
        return encoded["scales"].float().reshape(rows, -1).repeat_interleave(self.block, 1)[:, :columns]

    def with_codes(self, encoded: Encoded, places: Tensor) -> Encoded:
        """Return `codes` and `scales`."""
        codes = F.pad(places + (self._zero - self._largest), (0, -places.shape[1] % self.block), value=self._zero)
        return {"codes": pack(codes.reshape(-1), self.bits), **encoded}

    def decode(self, encoded: Encoded, shape: tuple[int, int]) -> Tensor:
        """Return integers times scales, float32, shape `shape`."""
        rows, columns = shape
        width = -(-columns // self.block) * self.block
        codes = unpack(encoded["codes"], self.bits, rows * width) - self._zero
        blocks = codes.reshape(-1, self.block).float() * encoded["scales"].float()[:, None]
        return blocks.reshape(rows, width)[:, :columns]

    def empty(self, shape: tuple[int, int]) -> Encoded:
        """Return uninitialised tensors."""
        rows, columns = shape
        blocks = rows * -(-columns // self.block)
        codes = torch.empty(packed_bytes(blocks * self.block, self.bits), dtype=torch.uint8)
        return {"codes": codes, "scales": torch.empty(blocks, dtype=torch.float32)}

    def bits_per_weight(self) -> float:
        """Return bits + 32 / block."""
        return self.bits + 32 / self.block

    @property
    def _zero(self) -> int:
        return int(2 ** (self.bits - 1))

    @property
    def _largest(self) -> int:
        return self._zero - 1
