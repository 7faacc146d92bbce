"""Codes of a few bits, packed into bytes without a gap."""

import torch
from torch import Tensor

MOST = 16  # bits of a code
FIELDS = {  # bits of a code -> the fields that it is stored in, the highest first: 8, 4, 2 or 1 bits each
    bits: (8,) * (bits // 8) + tuple(field for field in (4, 2, 1) if bits & field) for bits in range(1, MOST + 1)
}


def packed_bytes(count: int, bits: int) -> int:
    """Return how many bytes `count` codes of `bits` bits take; every field ends at a whole byte."""
    return sum(-(-count * field // 8) for field in FIELDS[bits])


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (count,) in 0 … 2**bits - 1 into uint8, the first code of a byte in its lowest bits.

    A code of 3 bits is stored as its upper two, packed together, and after all of them the lowest ones; so are all codes
    whose bits are no power of two. Raises ValueError for a number of bits that has no layout.
    """
    if bits not in FIELDS:
        raise ValueError(f"codes of {bits} bits cannot be packed; 1 to {MOST} bits can")
    parts, low = [], bits
    for field in FIELDS[bits]:
        low -= field
        of_field = (codes.to(torch.int32) >> low) & (2**field - 1)
        per_byte = 8 // field
        padded = torch.nn.functional.pad(of_field, (0, -len(of_field) % per_byte)).reshape(-1, per_byte)
        parts.append((padded << _shifts(field, codes.device)).sum(1).to(torch.uint8))
    return torch.cat(parts)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the codes (count,) as int32 that `pack` has packed."""
    parts, start, low = [], 0, bits
    for field in FIELDS[bits]:
        low -= field
        end = start + -(-count * field // 8)
        whole = packed[start:end].to(torch.int32)
        if field < 8:
            spread = torch.bitwise_right_shift(whole[:, None], _shifts(field, packed.device))
            whole = torch.bitwise_and(spread, 2**field - 1).reshape(-1)[:count]
        parts.append(whole * 2**low if low else whole)
        start = end
    codes = parts[0]
    for part in parts[1:]:
        codes = codes + part
    return codes


def _shifts(field: int, device: torch.device) -> Tensor:
    """Return where each code of a byte begins."""
    return torch.arange(0, 8, field, dtype=torch.int32, device=device)
