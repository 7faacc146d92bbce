"""NormalFloat: values at the quantiles of a normal distribution, scaled by blocks; the scales are quantised too.

Source: Dettmers et al. (2023), QLoRA, arXiv:2305.14314; for other widths and scales Guo et al. (2024), LQ-LoRA,
arXiv:2311.12023.
"""

from functools import lru_cache
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from lrc.formats.base import Encoded, NumberFormat
from lrc.formats.packing import pack, packed_bytes, unpack

OUTERMOST = 0.9677083  # the quantile of the largest value, as bitsandbytes chose it
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@lru_cache
def normalfloat_values(bits: int) -> Tensor:
    """Return the 2**bits values, ascending from -1 to 1 with 0 among them; float32, on the CPU."""
    half = 2 ** (bits - 1)
    below = torch.linspace(1 - OUTERMOST, 0.5, half, dtype=torch.float64)[:-1]
    above = torch.linspace(0.5, OUTERMOST, half + 1, dtype=torch.float64)
    values: Tensor = torch.special.ndtri(torch.cat([below, above]))
    return (values / values[-1]).float()


class NormalFloat(NumberFormat):
    """2**bits values scaled by blocks of `block` numbers in row-major order.

    A scale is the largest magnitude of its block. Scales are stored in `scale_bits` bits, relative to the largest of
    `super_block` scales and above the smallest of the whole matrix; as `scale_dtype` themselves where `scale_bits` is null.
    """

    type: Literal["nf"] = "nf"
    bits: Literal[2, 3, 4, 8] = Field(default=4, description="Bits of a number.")
    block: int = Field(default=64, ge=2, description="Numbers that share a scale.")
    scale_bits: Literal[2, 3, 4, 8] | None = Field(
        default=8, description="Bits of a scale; null: scales are stored as they are."
    )
    super_block: int = Field(default=256, ge=1, description="Scales that share a scale of their own.")
    scale_dtype: Literal["float32", "float16", "bfloat16"] = Field(default="float32", description="Of the outermost scales.")
    floating: ClassVar[frozenset[str]] = frozenset({"scales", "steps", "offset"})

    @property
    def levels(self) -> Tensor:
        """The quantiles."""
        return normalfloat_values(self.bits)

    def in_blocks(self, weight: Tensor) -> Tensor:
        """Return pieces of the matrix in row-major order."""
        flat = weight.reshape(-1)
        return F.pad(flat, (0, -len(flat) % self.block)).reshape(-1, self.block)

    def store_scales(self, scales: Tensor, shape: tuple[int, int]) -> Encoded:
        """Return `scales`, or their codes with `steps` and `offset`."""
        dtype, scales = DTYPES[self.scale_dtype], scales.float()
        if self.scale_bits is None:
            return {"scales": scales.to(dtype)}
        offset = scales.min()
        above = scales - offset
        groups = F.pad(above, (0, -len(above) % self.super_block)).reshape(-1, self.super_block)
        steps = groups.amax(1).to(dtype)
        largest = steps.float()[:, None]
        top = 2**self.scale_bits - 1
        share = torch.where(largest > 0, groups / torch.where(largest > 0, largest, torch.ones_like(largest)), 0.0)
        codes = (share * top).round().clamp(0, top).reshape(-1)[: len(scales)].to(torch.int32)  # a step may have rounded down
        return {"scale_codes": pack(codes, self.scale_bits), "steps": steps, "offset": offset.reshape(1)}

    def spread_scales(self, encoded: Encoded, shape: tuple[int, int]) -> Tensor:
        """Return the scale of every entry."""
        count = shape[0] * shape[1]
        scales = self._scales(encoded, -(-count // self.block))
        return scales.repeat_interleave(self.block)[:count].reshape(shape)

    def with_codes(self, encoded: Encoded, places: Tensor) -> Encoded:
        """Return `codes` and the scales."""
        return {"codes": pack(places.reshape(-1), self.bits), **encoded}

    def _scales(self, encoded: Encoded, blocks: int) -> Tensor:
        """Return the scale of every block, (blocks,), float32."""
        if self.scale_bits is None:
            return encoded["scales"].float()
        codes = unpack(encoded["scale_codes"], self.scale_bits, blocks).float()
        steps = encoded["steps"].float().repeat_interleave(self.super_block)[:blocks]
        return encoded["offset"] + codes * steps / (2**self.scale_bits - 1)

    def decode(self, encoded: Encoded, shape: tuple[int, int]) -> Tensor:
        """Return values times scales, float32, shape `shape`."""
        count = shape[0] * shape[1]
        blocks = -(-count // self.block)
        values = normalfloat_values(self.bits).to(encoded["codes"].device)
        found = values[unpack(encoded["codes"], self.bits, count).long()]
        padded = F.pad(found, (0, blocks * self.block - count)).reshape(blocks, self.block)
        return (padded * self._scales(encoded, blocks)[:, None]).reshape(-1)[:count].reshape(shape)

    def empty(self, shape: tuple[int, int]) -> Encoded:
        """Return uninitialised tensors."""
        count = shape[0] * shape[1]
        blocks, dtype = -(-count // self.block), DTYPES[self.scale_dtype]
        codes = torch.empty(packed_bytes(count, self.bits), dtype=torch.uint8)
        if self.scale_bits is None:
            return {"codes": codes, "scales": torch.empty(blocks, dtype=dtype)}
        return {
            "codes": codes,
            "scale_codes": torch.empty(packed_bytes(blocks, self.scale_bits), dtype=torch.uint8),
            "steps": torch.empty(-(-blocks // self.super_block), dtype=dtype),
            "offset": torch.empty(1, dtype=torch.float32),
        }

    def bits_per_weight(self) -> float:
        """Return bits + scale_bits / block + bits of the outermost scales; the one offset of a matrix is not counted."""
        outer = 8 * DTYPES[self.scale_dtype].itemsize
        if self.scale_bits is None:
            return self.bits + outer / self.block
        return self.bits + self.scale_bits / self.block + outer / (self.block * self.super_block)
