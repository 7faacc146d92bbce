"""Moments of an optimiser in 8 bits: block-wise dynamic quantisation.

Dettmers, Lewis, Shleifer & Zettlemoyer (2022), arXiv:2110.02861, sections 2 and 3: every block of 256 numbers is divided by
its largest magnitude and stored as the nearest of 256 values, whose spacing shrinks by ten from decade to decade.
"""

from enum import Enum
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

BLOCK = 256
DECADES = 7


class Codes(Enum):
    """Which values the codes stand for: -1 … 1, or 0 … 1."""

    SIGNED = "signed"
    UNSIGNED = "unsigned"


@lru_cache(maxsize=2)
def levels(codes: Codes) -> Tensor:
    """Return the values of the 256 codes, ascending, float32.

    Decade i (of 7, the largest is (0.1, 1]) has 2^i equal steps for signed codes and 2^(i+1) for unsigned ones, each stood
    for by its middle; 0 and 1 are exact.
    """
    signed = codes is Codes.SIGNED
    positive = []
    for i in range(DECADES):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, dtype=torch.float64)
        positive.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i + 1 - DECADES))
    values = torch.cat(positive)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    return torch.cat([-values, values, ends] if signed else [values, ends]).sort().values.float()


def quantize(values: Tensor, codes: Codes) -> tuple[Tensor, Tensor]:
    """Return the codes of `values`, uint8 and flat, and the scale of every block of 256, float32."""
    flat = values.reshape(-1).float()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1)
    table = levels(codes).to(flat.device)
    middles = (table[1:] + table[:-1]) / 2
    found = torch.bucketize(blocks / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None], middles)
    return found.to(torch.uint8).reshape(-1)[: flat.numel()], scale


def dequantize(codes: Tensor, scale: Tensor, shape: torch.Size, kind: Codes) -> Tensor:
    """Return what the codes stand for, float32."""
    values = levels(kind).to(codes.device)[codes.long()]
    return (values * scale.repeat_interleave(BLOCK)[: values.numel()]).view(shape)


def moment_bytes(numbers: int, itemsize: int, bits: int) -> int:
    """Return the bytes that a moment of so many numbers is stored in."""
    return numbers + 4 * -(-numbers // BLOCK) if bits == 8 else numbers * itemsize


def read_moment(state: dict[str, Any], name: str, like: Tensor) -> Tensor:
    """Return a moment as it may be changed in place; zeros of the shape and dtype of `like` before the first step."""
    if name in state:
        found: Tensor = state[name]
        return found
    if f"{name}_codes" in state:
        kind = Codes.UNSIGNED if name.endswith("sq") else Codes.SIGNED
        return dequantize(state[f"{name}_codes"], state[f"{name}_scale"], like.shape, kind).to(like.dtype)
    return torch.zeros_like(like)


def write_moment(state: dict[str, Any], name: str, value: Tensor, kind: Codes) -> None:
    """Store a moment as codes and scales."""
    state[f"{name}_codes"], state[f"{name}_scale"] = quantize(value, kind)
